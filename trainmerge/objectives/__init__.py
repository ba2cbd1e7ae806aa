"""Losses that need no labels. Adding one is one file: a frozen dataclass, outputs and batch -> [B]."""

from trainmerge.objectives.alignment import Alignment
from trainmerge.objectives.base import Objective
from trainmerge.objectives.entropy import Entropy

__all__ = ["Alignment", "Entropy", "Objective"]
