"""Models that are sparse by themselves: their activations are exactly zero for many inputs, and zeros are not read."""
