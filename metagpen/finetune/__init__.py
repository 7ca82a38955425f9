"""The usual few-shot tutorial on GPEN, made true: a long fine-tune on the pairs of one person."""

from .checkpoint import person_behind
from .options import Options
from .train import Finished, finetune

__all__ = ["Finished", "Options", "finetune", "person_behind"]
