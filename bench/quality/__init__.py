"""What sparsity costs in perplexity, KL divergence and task accuracy."""
