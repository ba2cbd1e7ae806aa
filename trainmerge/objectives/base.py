"""The interface of objectives.

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
        """The expert outputs that `batch.teacher` must have, recorded before the fit; by default none."""
        return Asks()

    @property
    def needs_classes(self) -> bool:
        """Whether it works for classification only: one row of logits per example."""
        return False

    @property
    def needs_logits(self) -> bool:
        """Whether the model must have an output layer, or the task a head."""
        return True

    @property
    def needs_predictions(self) -> bool:
        """Whether it needs probabilities, which the numbers of a regression are not."""
        return False

    @property
    def couples(self) -> bool:
        """Whether an example's loss depends on the others of its batch, which then must not be split."""
        return False

    @abstractmethod
    def __call__(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Loss per example, [B] float32. The module averages, weights the tasks and sums them."""
