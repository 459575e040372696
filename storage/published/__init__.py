"""Published folders: manifest, export, and reading one as a store."""
