"""What every objective is.

Legend: `B` examples.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from trainmerge.batch import Batch, Outputs


@dataclass(frozen=True)
class Objective(ABC):
    """A loss of the merged model on one expert's unlabeled batch."""

    @property
    def asks_teacher(self) -> bool:
        """Whether `batch.teacher`, each expert's own predictions, is to be recorded for this objective."""
        return False

    @abstractmethod
    def __call__(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Loss per example, [B] float32. The module averages, weighs the tasks and sums them."""
