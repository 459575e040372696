"""From a snapshot to the batches of a training step."""
