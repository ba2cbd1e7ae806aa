"""Every preprocessor in a list, random task vectors for them, and a calibrator in closed form.

Legend: `K` experts, `*S` parameter shape, `m x n` a matrix.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

import trainmerge as tm
from trainmerge.kernels import Difference
from trainmerge.preprocess import Informed
from trainmerge.task_vectors.delta import Delta, TaskVectors

METHODS: dict[str, tm.Preprocess] = {
    "aim": tm.Aim(),
    "breadcrumbs": tm.Breadcrumbs(0.5, 0.1),
    "consensus": tm.Consensus(),
    "core-space": tm.CoreSpace(),
    "dare": tm.Dare(0.5),
    "della": tm.Della(0.5, 0.4),
    "doge": tm.Doge(density=0.5),
    "doge-adam": tm.Doge(density=0.5, solver="adam"),
    "doge-am": tm.Doge(density=0.5, solver="adam", separate=True),
    "fisher": tm.Fisher(),
    "iso-c": tm.Iso(1.0),
    "iso-cts": tm.Iso(),
    "karcher": tm.Karcher(),
    "karcher-weights": tm.Karcher("weights"),
    "knots": tm.Knots(tm.Ties(0.5)),
    "localize": tm.LocalizeAndStitch(0.3),
    "magmax": tm.MagMax(),
    "model-stock": tm.ModelStock(),
    "opcm": tm.Opcm(),
    "optmerge": tm.OptMerge(),
    "optmerge-mean": tm.OptMerge(start="mean"),
    "pcb": tm.Pcb(0.3),
    "pico": tm.Pico(tm.Ties(0.5, merge="mean")),
    "ram": tm.Ram(),
    "ram+": tm.Ram(0.5, rescale=0.1),
    "rcp": tm.Rcp("a", "b"),
    "regmean": tm.RegMean(),
    "regmean++": tm.RegMean(sequential=True),
    "sce": tm.Sce(0.5),
    "slerp": tm.Slerp(0.3),
    "slerp-task-vectors": tm.Slerp(0.3, "task_vectors"),
    "svc": tm.Svc(),
    "ties": tm.Ties(0.5),
    "ties-mean": tm.Ties(0.5, merge="mean"),
    "ties-parameter": tm.Ties(0.5, scope="parameter"),
    "trim": tm.Trim(0.3),
    "trained-masks": tm.TrainedMasks(steps=8, rate=0.6),
    "tsv": tm.Tsv(),
    "tsv-energy": tm.Tsv(energy=0.7),
    "tsv-c": tm.Tsv(orthogonal=False),
    "widen": tm.Widen(),
    "wudi": tm.Wudi(300.0),
    "swudi": tm.Wudi(1300.0, keep=0.65),
    "aswudi": tm.Wudi(),
}
PAIRS = {"rcp", "slerp", "slerp-task-vectors"}  # for two experts
SHAPES = {"layer.weight": (6, 8), "layer.bias": (6,), "wide.weight": (2, 9), "norm.weight": (8,), "scale": ()}


def count_for(name: str) -> int:
    """How many experts to test a method with."""
    return 2 if name in PAIRS else 3


def random(count: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Differences, [K, *S] a parameter, float64."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(count, *shape, generator=generator, dtype=torch.float64)
        for name, shape in SHAPES.items()
    }


def bases(taus: Mapping[str, Tensor], seed: int = 9) -> dict[str, Tensor]:
    """A random base, [*S] a parameter, float64."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape[1:], generator=generator, dtype=torch.float64) for n, t in taus.items()}


def vectors(
    taus: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None, experts: str = "abcdef"
) -> TaskVectors:
    """Task vectors with these differences."""
    count = len(next(iter(taus.values())))
    base = base or bases(taus)
    deltas = {name: Delta(base[name], tuple(Difference(t) for t in tau)) for name, tau in taus.items()}
    return TaskVectors(tuple(experts[:count]), deltas)


def applied(method: tm.Preprocess, given: TaskVectors) -> dict[str, Tensor]:
    """The new differences."""
    if isinstance(method, Informed):
        return dict(method.informed(given, SoftmaxLayer(given)))
    return dict(method(given))


def run(method: tm.Preprocess, taus: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return applied(method, vectors(taus))


def one(method: tm.Preprocess, *taus: Tensor) -> Tensor:
    """A single matrix's result, [K, m, n]."""
    return run(method, {"w": torch.stack(taus)})["w"]


def matrices(*seeds: int, shape: Sequence[int] = (6, 8)) -> list[Tensor]:
    return [
        torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds
    ]


@dataclass(frozen=True)
class SoftmaxLayer:
    """A `Calibrator` whose network is p(y | x) = softmax(W x + b), on twelve inputs an expert."""

    given: TaskVectors
    written: dict[str, Tensor] = field(default_factory=dict)

    def inputs(self, expert: int) -> Tensor:
        seed = ord(self.given.experts[expert])  # an expert's examples go with its name
        width = self.given.deltas["layer.weight"].shape[0 if self.flipped else 1]
        return torch.randn(12, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    @property
    def flipped(self) -> bool:
        return self.given.deltas["layer.weight"].role == "transposed"

    def in_order(self, names: Iterable[str]) -> list[str]:
        return list(names)

    def grams(self, expert: int, names: Sequence[str], merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        del merged  # one layer: nothing comes before it
        x = self.inputs(expert)
        return {name: x.T @ x / len(x) for name in names if name == "layer.weight"}

    def magnitudes(self, names: Sequence[str]) -> dict[str, Tensor]:
        sizes = torch.cat([self.inputs(k) for k in range(len(self.given.experts))]).abs().mean(dim=0)
        return {name: sizes for name in names if name == "layer.weight"}

    def gradients(self, expert: int, sampled: bool) -> Iterator[dict[str, Tensor]]:
        del sampled  # one label or another: nothing here depends on how it was drawn
        weight, bias = (self._own(name, expert) for name in ("layer.weight", "layer.bias"))
        for number, x in enumerate(self.inputs(expert)):
            slope = ((weight.T if self.flipped else weight) @ x + bias).softmax(0)
            slope[number % len(slope)] -= 1
            zeros = {name: torch.zeros(delta.shape) for name, delta in self.given.deltas.items()}
            outer = torch.outer(slope, x)
            yield {**zeros, "layer.weight": outer.T if self.flipped else outer, "layer.bias": slope}

    def keep(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    @contextmanager
    def merge_of(self, task_vectors: TaskVectors, scale: float) -> Iterator[None]:
        for name, delta in task_vectors.deltas.items():
            self.written[name] = delta.base.double() + scale * delta.dense().double().sum(0)
        yield
        self.written.clear()

    def write(self, name: str, weight: Tensor) -> None:
        self.written[name] = weight.double()

    def imitation(self, expert: int) -> Callable[[], tuple[float, dict[str, Tensor]]]:
        x = self.inputs(expert)
        told = self._log_p(x, *(self._own(name, expert) for name in ("layer.weight", "layer.bias")))

        def compared() -> tuple[float, dict[str, Tensor]]:
            log_p = self._log_p(x, *(self.written[name] for name in ("layer.weight", "layer.bias")))
            loss = (told.exp() * (told - log_p)).sum(1).mean()
            slopes = (log_p.exp() - told.exp()) / len(x)  # [12, m]
            zeros = {name: torch.zeros(delta.shape) for name, delta in self.given.deltas.items()}
            outer = x.T @ slopes if self.flipped else slopes.T @ x
            return float(loss), {**zeros, "layer.weight": outer, "layer.bias": slopes.sum(0)}

        return compared

    def _log_p(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (x @ (weight if self.flipped else weight.T) + bias).log_softmax(1)

    def _own(self, name: str, expert: int) -> Tensor:
        delta = self.given.deltas[name]
        return delta.base.double() + delta.dense()[expert].double()
