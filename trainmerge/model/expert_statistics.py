"""Statistics of the experts, run as one-hot merges on their examples: inputs, gradients, likelihoods.

Legend: `K` experts, `N` texts, `R` rows, `H` hidden size, `n` inputs of a linear layer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn

from trainmerge.data.batch import Batch
from trainmerge.data.examples import Example
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.model.block_outputs import BlockOutputs, measure_block
from trainmerge.model.layer_inputs import Kept, Magnitude, Moment, Reads, Shifts, watching
from trainmerge.model.named_layers import linear_layers, norms
from trainmerge.model.predictions import predictions
from trainmerge.model.resident import Resident
from trainmerge.model.router_states import merged_routers, states_of
from trainmerge.model.text_statistics import divergences, imitated, likelihoods, text_gradients
from trainmerge.preprocess import Router
from trainmerge.system.atomic import temporary_folder
from trainmerge.system.safetensors_file import MappedFile, write_safetensors
from trainmerge.task_vectors.delta import TaskVectors

TOGETHER = 8  # examples per forward pass


@dataclass(frozen=True)
class ExpertStatistics:
    """`preprocess.Calibrator`, and a preset's `Measures`, over a resident model.

    Order and samples depend on the seed only.
    """

    resident: Resident
    examples: Sequence[Sequence[Example]]  # one list per expert
    tokenizer: Tokenizer
    folder: Path
    seed: int = 0
    weights: Sequence[float] = ()  # of the tasks, K

    @property
    def task_vectors(self) -> TaskVectors:
        """What the coefficients scale: the preprocessed task vectors."""
        return self.resident.merged.task_vectors

    @property
    def originals(self) -> TaskVectors:
        """The experts' own task vectors."""
        return self.resident.merged.originals

    def in_order(self, names: Iterable[str]) -> list[str]:
        """These parameters in the network's order."""
        places = {id(p): place for place, p in enumerate(self.resident.merged.module.parameters())}
        return sorted(names, key=lambda name: places[id(self.resident.merged.placed.owners[name])])

    def keep(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors, mapped from an unlinked temporary file, which is freed with them."""
        if not tensors:
            return {}
        with temporary_folder(self.folder, "measured") as place:
            path = place / "measured.safetensors"
            specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
            write_safetensors(path, specs, tensors.items())
            file = MappedFile(path)
            return {name: file.read(name) for name in tensors}

    def routers(self) -> Sequence[Router]:
        """The routers of mixtures of experts that are merged, in the network's order."""
        return merged_routers(self.resident.merged)

    def merge_of(self, task_vectors: TaskVectors, scale: float) -> AbstractContextManager[object]:
        """In this context the model is base + scale * sum of these task vectors."""
        return self.resident.merged.merge_of(task_vectors, scale)

    @torch.no_grad()
    def write(self, name: str, weight: Tensor) -> None:
        """Replace one weight of that model."""
        self.resident.merged.parameters[name].copy_(weight)

    def router_states(self, router: Router) -> Sequence[Tensor]:
        """Inputs [R, H] of a router in the model, on some tokens of every expert's examples."""
        batches = partial(self._batches, doing=f"reading {router.weight}")
        return states_of(self.resident.merged, router, batches, self.examples, self.resident)

    @torch.no_grad()
    def grams(self, expert: int, names: Sequence[str], merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Mean x x^T [n, n], float32, of the inputs x of each linear layer among `names`, without padding.

        Layers that read no row are left out, and weights that are read without their layer's forward.
        `merged` are weights that replace the expert's own. Needs n^2 numbers per layer.
        """
        parameters = self.resident.merged.parameters
        layers = linear_layers(self.resident.merged, names)
        if not layers:
            return {}
        moments = {name: Moment() for name in layers}
        with self.resident.merged.teacher(expert):
            for name, weight in merged.items():
                parameters[name].copy_(weight)
            self._watch(expert, layers, moments)
        return {name: moment.mean() for name, moment in moments.items() if moment.count}

    @torch.no_grad()
    def shifted(
        self, expert: int, names: Sequence[str], values: Tensor
    ) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Moments of a merge's layer inputs and of their distance from the expert's; see `Measures`.

        The expert's inputs of these layers, on all its examples, are in memory.
        """
        merged = self.resident.merged
        layers = linear_layers(merged, names)
        if not layers:
            return {}
        kept = {name: Kept() for name in layers}
        moments = {name: Shifts(own) for name, own in kept.items()}
        with merged.teacher(expert):
            self._watch(expert, layers, kept)
        reached = {name: layer for name, layer in layers.items() if kept[name].calls}
        with merged.at(values):
            self._watch(expert, reached, moments)
        return {name: moments[name].means() for name in reached}

    @torch.no_grad()
    def block(self, names: Sequence[str], values: Tensor) -> BlockOutputs | None:
        """The error of one block's outputs to the experts' own; see `Measures`."""
        batches = partial(self._batches, doing="measuring outputs")
        return measure_block(self.resident, names, values, batches, self.weights)

    def _watch(self, expert: int, layers: Mapping[str, nn.Module], reads: Mapping[str, Reads]) -> None:
        """Give the layers' inputs on the expert's examples, without padding, to `reads`."""
        for batch in self._batches(expert, "measuring inputs"):
            with watching(layers, reads, batch.inputs.get("attention_mask")):
                self.resident(batch)

    @torch.no_grad()
    def magnitudes(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Mean |x| [n], float32, of the inputs x of each linear layer and norm among `names`.

        Of the base on all experts' examples, without padding. Layers that read no row are left out.
        """
        merged = self.resident.merged
        layers = linear_layers(merged, names) | norms(merged, names)
        sizes = {name: Magnitude() for name in layers}
        with merged.uniform(torch.zeros(len(merged.task_vectors.experts)), everywhere=True):
            for expert in range(len(self.examples)):
                for batch in self._batches(expert, "measuring activations"):
                    with watching(layers, sizes, batch.inputs.get("attention_mask")):
                        self.resident(batch)
        return {name: size.mean() for name, size in sizes.items() if size.count}

    def gradients(self, expert: int, sampled: bool) -> Iterator[dict[str, Tensor]]:
        """Gradients of a loss with respect to every merged parameter, example by example (`text_gradients`).

        A sampled loss draws its tokens by the seed.
        """
        dice = torch.Generator().manual_seed(self.seed) if sampled else None
        with self.resident.merged.teacher(expert):
            yield from text_gradients(
                self.resident, self._batches(expert, "measuring gradients", together=1), dice
            )

    @torch.no_grad()
    def imitation(self, expert: int) -> Callable[[], tuple[float, dict[str, Tensor]]]:
        """What compares the model with this expert's predictions, which are kept in a file (`imitated`)."""
        with self.resident.merged.teacher(expert):
            batches = self._batches(expert, "recording predictions")  # in memory one batch at a time
            told = [self.keep({"told": predictions(self.resident(b), b)[0]})["told"] for b in batches]
        return lambda: imitated(self.resident, self._batches(expert), told)

    def likelihoods(self, expert: int, texts: Sequence[Example]) -> Tensor:
        """Log-likelihood of each text under the expert's language model, [N] float64: summed over tokens."""
        with self.resident.merged.teacher(expert):
            return likelihoods(self.resident, self._alone(expert, texts))

    def divergences(self, expert: int, texts: Sequence[Example]) -> Tensor:
        """Mean Jensen-Shannon divergence of base and expert on each text, [N] float64, in nats.

        Stores the base's predictions of as many texts as fit into PREDICTIONS bytes, at least one.
        """
        return divergences(self.resident, expert, [*self._alone(expert, texts)])

    def _alone(self, expert: int, texts: Sequence[Example]) -> Iterator[Batch]:
        """Each text in a batch of its own."""
        return (self.resident.batch(expert, [example], self.tokenizer) for example in texts)

    def _batches(self, expert: int, doing: str = "", together: int = TOGETHER) -> Iterator[Batch]:
        own, words = self.examples[expert], f"{doing} of expert {expert + 1}"
        for first in track(range(0, len(own), together), description=words, disable=not doing):
            yield self.resident.batch(expert, own[first : first + together], self.tokenizer, first)
