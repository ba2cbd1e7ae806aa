"""What every objective is.

Legend: `B` examples.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from trainmerge.data.batch import Asks, Batch, Outputs


@dataclass(frozen=True)
class Objective(ABC):
    """A loss of the merged model on one expert's unlabeled batch."""

    @property
    def asks(self) -> Asks:
        """What `batch.teacher` is to hold: recorded once, before the fit. Nothing by default."""
        return Asks()

    @property
    def needs_classes(self) -> bool:
        """Whether it is for classification only: one row of logits per example."""
        return False

    @property
    def couples(self) -> bool:
        """Whether an example's loss depends on the others of its batch, which then may not be cut."""
        return False

    @abstractmethod
    def __call__(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Loss per example, [B] float32. The module averages, weighs the tasks and sums them."""
