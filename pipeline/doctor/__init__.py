"""What this machine and a store can do, tried before a run needs it."""
