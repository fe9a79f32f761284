"""What all benchmarks share: result files, timing, CUDA graphs, layers and models, facts about the machine."""
