"""Fine-tuning of sparse, ReLUfied and dense models."""

from cats_ext.finetune.run import FinetuneSettings, finetune

__all__ = ["FinetuneSettings", "finetune"]
