"""Model files, checkpoints, and the state of environments."""
