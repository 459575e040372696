"""Where the shared assets lie: in STILLROOM_ASSETS, else beside the checkout."""

from os import environ
from pathlib import Path

ASSETS = Path(environ.get("STILLROOM_ASSETS", Path(__file__).parents[3] / "shared" / "assets"))
