"""Run the experts on their examples and gather the outputs that `teachers` writes.

Legend: `K` experts, `N` examples of one, `P` counted positions of all of them, `R` rows of logits (`P`, or
`N` under a head or in a classifier), `V` vocabulary or classes, `D` hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from trainmerge.data.batch import Asks
from trainmerge.data.examples import Example
from trainmerge.data.media import without_text
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.model.resident import Resident
from trainmerge.system import distributed

TOKENS = 512  # per forward pass; one example if it is longer
PICTURES = 16  # per forward pass, without text
ROWS = 32  # of logits converted to float32 at a time


class OutputSizes(NamedTuple):
    """The last dimension of each output."""

    logits: Sequence[int]  # K: each expert's V
    hidden: Mapping[int, int]  # layer -> D
    classes: bool  # whether the model's own logits are one row per example


@torch.no_grad()
def output_sizes(resident: Resident, tokenizer: Tokenizer, asks: Asks, example: Example) -> OutputSizes:
    """The sizes of logits and hidden states, from one forward pass, of an expert without a head if any."""
    heads = resident.classifiers
    k = next((k for k, head in enumerate(heads) if head is None), 0)
    logits, states = resident(resident.batch(k, [example], tokenizer), asks.layers)
    hidden = {layer: state.shape[-1] for layer, state in states.items()}
    widths = [logits.shape[-1] if head is None else len(head.weight) for head in heads]
    return OutputSizes(widths, hidden, classes=logits.dim() == 2)


def count_positions(expert: int, examples: Sequence[Example], tokenizer: Tokenizer) -> list[int]:
    """The number of unmasked positions of each example.

    Raises:
        ValueError: an example has none.
    """
    if without_text(examples) and examples[0].target is None:
        return [1] * len(examples)  # one row each, whatever its size
    counts = [int(tokenizer.encode([example]).mask.sum()) for example in examples]
    for i, count in enumerate(counts):
        if not count:
            raise ValueError(
                f"example {i} of expert {expert} has no unmasked position in its first "
                f"{tokenizer.max_length} tokens: raise data.max_length, or remove it"
            )
    return counts


def cumulated(counts: Sequence[int]) -> list[int]:
    """Cumulative sums of the counts, starting with 0."""
    return [0, *torch.tensor(counts).cumsum(0).tolist()]


def _spans(starts: Sequence[int], ids: Tensor) -> Tensor:
    return torch.cat([torch.arange(starts[i], starts[i + 1]) for i in ids.tolist()])


@dataclass(frozen=True)
class Recorder:
    """Runs every expert on its own examples, on all processes."""

    resident: Resident
    tokenizer: Tokenizer
    asks: Asks
    counts: Sequence[Sequence[int]]  # K lists: unmasked positions per example
    sizes: OutputSizes
    budget: int

    def specs(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of every tensor that `run` yields."""
        specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for k, of_expert in enumerate(self.counts):
            if self.asks.temperature is not None:
                rows, width = self._rows(k), self._width(k)
                specs[f"{k}.log_p"] = (torch.float32, (rows, width))
                if width < self.sizes.logits[k]:
                    specs[f"{k}.tokens"] = (torch.int32, (rows, width))
                    specs[f"{k}.tail"] = (torch.float32, (rows,))
            for layer in self.asks.layers:
                specs[f"{k}.hidden.{layer}"] = (self.asks.dtype, (sum(of_expert), self.sizes.hidden[layer]))
        return specs

    def run(self, examples: Sequence[Sequence[Example]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of `specs`, in its order."""
        names = list(self.specs())
        quiet = distributed.rank() > 0
        for k in track(range(len(examples)), description="recording the experts", disable=quiet):
            with self.resident.merged.teacher(k):
                parts = self._expert(k, examples[k])
            for name in names:
                if name.startswith(f"{k}."):
                    yield name, parts[name.partition(".")[2]]

    @torch.no_grad()
    def _expert(self, k: int, examples: Sequence[Example]) -> dict[str, Tensor]:
        """One expert's parts, with rows in the order of `examples`; complete on the first process only.

        In each round every process runs one batch. A process without a batch repeats another's, because
        collectives of a sharded model need all processes.
        """
        starts = cumulated(self.counts[k])
        row_starts = list(range(len(examples) + 1)) if self._under_head(k) else starts
        parts: dict[str, Tensor] = {
            name.partition(".")[2]: torch.empty(shape, dtype=dtype)
            for name, (dtype, shape) in self.specs().items()
            if name.startswith(f"{k}.")
        }
        batches = list(self._batches(k, PICTURES if without_text(examples) else TOKENS))
        for begin in range(0, len(batches), distributed.world_size()):
            together = batches[begin : begin + distributed.world_size()]
            mine = [examples[i] for i in together[distributed.rank() % len(together)]]
            signals = {name: rows.to(parts[name]) for name, rows in self._signals(k, mine).items()}
            spare = distributed.rank() >= len(together)
            for ids, of_batch in zip(together, distributed.gather({} if spare else signals), strict=False):
                for name, rows in of_batch.items():
                    places = _spans(starts if name.startswith("hidden.") else row_starts, torch.tensor(ids))
                    parts[name][places] = rows
        return parts

    def _batches(self, k: int, most: int) -> Iterator[list[int]]:
        """Batches of example indices sorted by length, to reduce padding, of at most so many positions."""
        order = sorted(range(len(self.counts[k])), key=lambda i: self.counts[k][i])
        batch: list[int] = []
        for i in order:
            if batch and (len(batch) + 1) * self.counts[k][i] > most:
                yield batch
                batch = []
            batch.append(i)
        yield batch

    def _signals(self, k: int, examples: Sequence[Example]) -> dict[str, Tensor]:
        batch = self.resident.batch(k, examples, self.tokenizer)
        outputs = self.resident(batch, self.asks.layers)
        signals = {f"hidden.{i}": state[batch.mask] for i, state in outputs.hidden.items()}
        if (temperature := self.asks.temperature) is not None:
            logits = outputs.logits if outputs.logits.dim() == 2 else outputs.logits[batch.mask]
            width = self._width(k)
            pieces = [
                _largest((rows.float() / temperature).log_softmax(-1), width)
                for rows in torch.split(logits, ROWS)
            ]
            signals |= {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        return signals

    def _under_head(self, k: int) -> bool:
        return self.sizes.classes or self.resident.classifiers[k] is not None

    def _rows(self, k: int) -> int:
        return len(self.counts[k]) if self._under_head(k) else sum(self.counts[k])

    def _width(self, k: int) -> int:
        """Recorded probabilities per row: all if they fit into the budget, else as many as fit."""
        rows = [self._rows(j) for j in range(len(self.counts))]
        if sum(4 * R * V for R, V in zip(rows, self.sizes.logits, strict=True)) <= self.budget:
            return self.sizes.logits[k]
        fitting = self.budget // (8 * sum(rows))  # one float32 and one int32 each
        return max(1, min(self.sizes.logits[k], fitting))


def _largest(log_p: Tensor, width: int) -> dict[str, Tensor]:
    """The `width` largest of each row, and the mass of the rest."""
    if width == log_p.shape[-1]:
        return {"log_p": log_p}
    top, tokens = log_p.topk(width, dim=-1, sorted=False)
    tail = log_p.scatter(-1, tokens, -torch.inf).logsumexp(dim=-1)
    return {"log_p": top, "tokens": tokens, "tail": tail}
