"""Export: checkpoints on disk."""
