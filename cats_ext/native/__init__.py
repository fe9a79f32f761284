"""The compiled libraries of cats_ext."""
