"""Statistics of the experts, run as one-hot merges on their examples: inputs, gradients, likelihoods.

Legend: `B` examples, `T` tokens, `R` rows, `n` inputs of a linear layer, `V` vocabulary or classes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from math import log
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trainmerge.data.batch import Batch
from trainmerge.data.examples import Example
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.model.layer_inputs import Magnitude, Moment, watching
from trainmerge.model.resident import Resident
from trainmerge.model.router_states import merged_routers, states_of
from trainmerge.preprocess import Router
from trainmerge.system.atomic import temporary_folder
from trainmerge.system.safetensors_file import MappedFile, write_safetensors
from trainmerge.task_vectors.delta import TaskVectors
from trainmerge.task_vectors.places import view
from trainmerge.task_vectors.roles import LINEAR

TOGETHER = 8  # examples per forward pass
PREDICTIONS = 256 << 20  # bytes of the base's predictions stored at a time


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
        layers = self._layers(names)
        if not layers:
            return {}
        moments = {name: Moment() for name in layers}
        with self.resident.merged.teacher(expert):
            for name, weight in merged.items():
                parameters[name].copy_(weight)
            for batch in self._batches(expert, "measuring inputs"):
                real = batch.inputs.get("attention_mask")
                with watching(layers, moments, real):
                    self.resident(batch)
        return {name: moment.mean() for name, moment in moments.items() if moment.count}

    @torch.no_grad()
    def magnitudes(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Mean |x| [n], float32, of the inputs x of each linear layer and norm among `names`.

        Of the base on all experts' examples, without padding. Layers that read no row are left out.
        """
        merged = self.resident.merged
        layers = self._layers(names) | self._norms(names)
        sizes = {name: Magnitude() for name in layers}
        with merged.uniform(torch.zeros(len(merged.task_vectors.experts)), everywhere=True):
            for expert in range(len(self.examples)):
                for batch in self._batches(expert, "measuring activations"):
                    with watching(layers, sizes, batch.inputs.get("attention_mask")):
                        self.resident(batch)
        return {name: size.mean() for name, size in sizes.items() if size.count}

    def _layers(self, names: Iterable[str]) -> dict[str, nn.Module]:
        """The linear layer (nn.Linear, Conv1D) of each parameter that is one's weight."""
        deltas = self.resident.merged.task_vectors.deltas
        linear = [name for name in names if deltas[name].role in LINEAR]
        return self._owners(linear, lambda module: isinstance(module, nn.Linear | Conv1D))

    def _norms(self, names: Iterable[str]) -> dict[str, nn.Module]:
        """The module of each vector that is one's weight: a norm."""
        deltas = self.resident.merged.task_vectors.deltas
        vectors = [name for name in names if deltas[name].role == "vector" and len(deltas[name].shape) == 1]
        return self._owners(vectors, lambda module: isinstance(getattr(module, "weight", None), nn.Parameter))

    def _owners(self, names: Iterable[str], kind: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
        """The module of this kind of each parameter that is one's weight."""
        merged = self.resident.merged
        owners = {id(module.weight): module for module in merged.module.modules() if kind(module)}
        found = {name: owners.get(id(merged.parameters[name])) for name in names}
        return {name: module for name, module in found.items() if module is not None}

    def gradients(self, expert: int, sampled: bool) -> Iterator[dict[str, Tensor]]:
        """Gradients of a loss with respect to every merged parameter, example by example.

        `sampled`: -log p(y | x) of a y drawn at every unmasked position, whose mean square is the Fisher
        information. Otherwise the language-model loss: the mean over the text's next tokens.
        """
        merged = self.resident.merged
        owners = {id(p): p for p in merged.placed.owners.values() if p.requires_grad}
        parameters = {n: p for n, p in merged.parameters.items() if id(merged.placed.owners[n]) in owners}
        dice = torch.Generator().manual_seed(self.seed)
        with self.resident.merged.teacher(expert):
            for batch in self._batches(expert, "measuring gradients", together=1):
                with torch.enable_grad():
                    log_p, tokens = self._log_p(batch)
                    if sampled:
                        tokens = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=dice)[:, 0]
                    each = -log_p.gather(-1, tokens.to(log_p.device)[:, None])
                    loss = each.sum() if sampled else each.mean()
                    found = torch.autograd.grad(loss, list(owners.values()), allow_unused=True)
                slopes = dict(zip(owners, found, strict=True))
                yield {
                    name: torch.zeros_like(p) if slope is None else view(merged.placed.inside[name], slope)
                    for name, p in parameters.items()
                    for slope in [slopes[id(merged.placed.owners[name])]]
                }

    @torch.no_grad()
    def likelihoods(self, expert: int, texts: Sequence[Example]) -> Tensor:
        """Log-likelihood of each text under the expert's language model, [N] float64: summed over tokens."""
        found = []
        with self.resident.merged.teacher(expert):
            for example in texts:
                log_p, tokens = self._log_p(self.resident.batch(expert, [example], self.tokenizer))
                found.append(log_p.gather(-1, tokens[:, None]).double().sum())
        return torch.stack(found).cpu()

    @torch.no_grad()
    def divergences(self, expert: int, texts: Sequence[Example]) -> Tensor:
        """Mean Jensen-Shannon divergence of base and expert on each text, [N] float64, in nats.

        Stores the base's predictions of as many texts as fit into PREDICTIONS bytes, at least one.
        """
        merged = self.resident.merged
        found: list[Tensor] = []
        while left := texts[len(found) :]:
            with merged.uniform(torch.zeros(len(merged.task_vectors.experts)), everywhere=True):
                bases = self._predictions(expert, left)
            with merged.teacher(expert):
                for example, base in zip(left, bases, strict=False):
                    own, _ = self._log_p(self.resident.batch(expert, [example], self.tokenizer))
                    found.append(_jensen_shannon(base, own))
        return torch.stack(found).cpu()

    def _predictions(self, expert: int, texts: Sequence[Example]) -> list[Tensor]:
        """Log-probabilities [R, V] of the first texts, up to PREDICTIONS bytes."""
        stored: list[Tensor] = []
        for example in texts:
            stored.append(self._log_p(self.resident.batch(expert, [example], self.tokenizer))[0])
            if sum(log_p.nbytes for log_p in stored) > PREDICTIONS:
                break
        return stored

    def _log_p(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Predictions [R, V] and the next tokens [R]; no tokens under a head.

        Raises:
            ValueError: the head is a regression, whose numbers are no predictions.
        """
        outputs = self.resident(batch)
        logits = outputs.logits
        if outputs.kind == "values":
            raise ValueError("a method needs each expert's predictions, and a regression's numbers are none")
        if outputs.of is not None:  # an expert's own head
            logits = logits[batch.mask] if outputs.of == "tokens" else logits.flatten(0, -2)
        if logits.dim() == 2:
            return logits.float().log_softmax(-1), torch.zeros(len(logits), dtype=torch.int64)
        tokens = batch.inputs.get("labels", batch.inputs["input_ids"])
        if "labels" not in batch.inputs:  # a decoder's input is already shifted
            logits, tokens, counted = logits[:, :-1], tokens[:, 1:], batch.mask[:, :-1] & batch.mask[:, 1:]
        else:
            counted = batch.mask
        return logits[counted].float().log_softmax(-1), tokens[counted]

    def _batches(self, expert: int, doing: str, together: int = TOGETHER) -> Iterator[Batch]:
        own = self.examples[expert]
        for first in track(range(0, len(own), together), description=f"{doing} of expert {expert + 1}"):
            yield self.resident.batch(expert, own[first : first + together], self.tokenizer, first)


def _jensen_shannon(one: Tensor, other: Tensor) -> Tensor:
    """Mean over rows of the Jensen-Shannon divergence of two log-probabilities [R, V]; float64."""
    middle = torch.logaddexp(one, other) - log(2)
    both = torch.stack([(log_p.exp() * (log_p - middle)).sum(-1) for log_p in (one, other)])
    return both.mean(dim=0).double().mean()
