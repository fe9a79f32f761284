"""Fine-tuning of sparse, ReLUfied and dense models."""

from cats_ext.finetune.run import finetune, relufy
from cats_ext.finetune.settings import METHODS, FinetuneSettings
from cats_ext.finetune.trainer import TrainingStoppedError

__all__ = ["METHODS", "FinetuneSettings", "TrainingStoppedError", "finetune", "relufy"]
