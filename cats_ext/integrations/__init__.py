"""How cats_ext fits into other libraries: accelerate's hooks and transformers' checkpoints."""
