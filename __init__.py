"""Root of the import map: lets static tools follow the relative imports between the three folders. Not shipped."""
