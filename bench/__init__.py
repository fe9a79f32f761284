"""Benchmarks of cats_ext. Each runs as ``python bench FOLDER.NAME [options]``; see the header of its file."""
