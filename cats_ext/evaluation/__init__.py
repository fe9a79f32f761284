"""What sparsity costs: perplexity, divergence and agreement beside the dense model, tasks, figures and a report."""

from cats_ext.evaluation.comparison import Comparison, Perplexity, compare, perplexity

__all__ = ["Comparison", "Perplexity", "compare", "perplexity"]
