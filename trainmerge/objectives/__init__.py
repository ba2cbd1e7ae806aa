"""Losses without labels. Each is one file: a frozen dataclass that maps outputs and batch to [B]."""

from trainmerge.objectives.alignment import Alignment
from trainmerge.objectives.base import Objective
from trainmerge.objectives.entropy import Entropy
from trainmerge.objectives.jensen_shannon import JensenShannon
from trainmerge.objectives.similarity import Similarity
from trainmerge.objectives.total_variation import TotalVariation

__all__ = ["Alignment", "Entropy", "JensenShannon", "Objective", "Similarity", "TotalVariation"]
