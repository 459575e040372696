"""What DuckDB may hold in memory, and beyond that on disk.

Two environment variables say how much.
"""

SETTINGS = {
    "STILLROOM_SQL_MEMORY": "memory_limit",
    "STILLROOM_SQL_DISK": "max_temp_directory_size",
}
"""Environment variable -> DuckDB's setting."""
OF_QUERIES = {"memory_limit": "2GB", "max_temp_directory_size": "20GB"}
"""What SQL of people may hold where the environment says nothing."""
OF_COUNTS = {"memory_limit": "800MB", "max_temp_directory_size": "200GB"}
"""What a plan may hold while it counts."""
OF_RESULTS = {**OF_COUNTS, "memory_limit": "8GB"}
"""What it may hold for rows to be made or trained on: there may be hundreds of millions of them."""
GIVE_MORE = f"give it more: {' and '.join(SETTINGS)} say how much"
