"""DELLA's MagPrune: drop entries at random, small ones more often, and rescale the rest.

Deep et al., 2024 (arXiv 2406.11617).

Legend: `K` experts, `*S` shape of a parameter or of some rows of it.
"""

from dataclasses import dataclass

from torch import Tensor
from typing_extensions import override

from trainmerge.preprocess.piecewise import Piecewise, Rule
from trainmerge.system.ranges import check_fields
from trainmerge.task_vectors.delta import Delta, TaskVectors
from trainmerge.task_vectors.draws import uniform
from trainmerge.task_vectors.roles import Role


@dataclass(frozen=True)
class Della(Piecewise):
    """Keep each entry with a probability that grows with its rank in its row, and divide it by that.

    From density - window / 2 for a row's smallest magnitude to density + window / 2 for its largest; a row
    has the weights of one output. Then `Ties(density=1.0, merge="mean")` elects signs and fuses; the
    coefficient is the paper's lambda. The draws depend only on seed, expert and parameter name (and rows, if
    it is large).

    Args:
        density: Mean probability of keeping an entry, in (0, 1].
        window: Width of the probabilities, twice the `epsilon` of mergekit; 0 is DARE.
        seed: Seed of the random draws.
    """

    density: float = 0.5
    window: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self, density="(0, 1]", window="[0, 1)")
        if not (self.density - self.window / 2 > 0 and self.density + self.window / 2 <= 1):
            low, high = self.density - self.window / 2, self.density + self.window / 2
            raise ValueError(
                f"Della.density {self.density:g} and window {self.window:g} give probabilities from {low:g} "
                f"to {high:g}; they must be in (0, 1]"
            )

    @override
    def rule(self, task_vectors: TaskVectors) -> Rule:
        return Sampled(self, task_vectors)

    def probabilities(self, tau: Tensor, role: Role = "") -> Tensor:
        """Of keeping each entry of one expert's rows, [*S].

        Rows are those of outputs, also of a layer that is stored transposed.
        """
        if role == "transposed" and tau.dim() > 1:
            return self.probabilities(tau.mT.contiguous()).mT
        rows = tau.reshape(-1, tau.shape[-1] if tau.dim() else 1)
        ranks = rows.abs().argsort(dim=1, stable=True).argsort(dim=1).to(tau.dtype)
        low, last = self.density - self.window / 2, max(1, rows.shape[1] - 1)
        return (low + ranks * (self.window / last)).view(tau.shape)


class Sampled:
    """The rule; a piece of a matrix stored transposed has parts of its rows, which are ranked whole."""

    def __init__(self, method: Della, task_vectors: TaskVectors) -> None:
        self.method, self.task_vectors = method, task_vectors
        self._last: tuple[str, list[Tensor]] = "", []  # a matrix, and its probabilities of each expert

    def __call__(self, name: str, delta: Delta) -> Tensor:
        """A piece's new differences, [K, *S]."""
        taus = delta.dense()
        keeps = self._keeps(name, delta, taus)
        for tau, keep, expert in zip(taus, keeps, self.task_vectors.experts, strict=True):
            tau.mul_(uniform(tau.shape, self.method.seed, expert, name) < keep).div_(keep)
        return taus

    def _keeps(self, name: str, delta: Delta, taus: Tensor) -> list[Tensor]:
        """The probabilities of each expert's entries, [*S] each."""
        parent, _, rows = name.rpartition("[")
        if name in self.task_vectors.deltas or delta.role != "transposed" or taus.dim() != 3:
            return [self.method.probabilities(tau, delta.role) for tau in taus]
        last, whole = self._last
        if last != parent:
            every = self.task_vectors.deltas[parent].dense()
            whole = [self.method.probabilities(tau, delta.role) for tau in every]
            self._last = parent, whole
        first = int(rows.partition(":")[0])
        return [keep[first : first + len(delta.base)] for keep in whole]
