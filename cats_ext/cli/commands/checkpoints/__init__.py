"""The commands that write a checkpoint."""
