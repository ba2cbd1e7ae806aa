"""Run the experts on their examples and gather the outputs that `teachers` writes.

Legend: `K` experts, `N` examples of one, `P` counted positions of all of them, `R` rows of logits (`P`, or
`N` under a head or in a classifier; two per example of answer spans, one per label), `V` vocabulary or
classes, `D` hidden size, `E` embedding's width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor

from trainmerge.data.batch import Asks, Outputs
from trainmerge.data.examples import Example
from trainmerge.data.media import without_text
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.model.output_sizes import OutputSizes
from trainmerge.model.resident import Resident
from trainmerge.system import distributed

TOKENS = 512  # per forward pass; one example if it is longer
EMBEDDING = "embedding"  # the part with one sentence embedding per example
PICTURES = 16  # per forward pass, without text
ROWS = 32  # of logits converted to float32 at a time


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
            if self.asks.temperature is not None and self.sizes.kinds[k] == "values":
                specs[f"{k}.values"] = (torch.float32, (len(of_expert), self.sizes.logits[k]))
            elif self.asks.temperature is not None:
                rows, width = self.row_starts(k)[-1], self._width(k)
                specs[f"{k}.log_p"] = (torch.float32, (rows, width))
                if width < self.sizes.logits[k]:
                    specs[f"{k}.tokens"] = (torch.int32, (rows, width))
                    specs[f"{k}.tail"] = (torch.float32, (rows,))
            for layer in self.asks.layers:
                specs[f"{k}.hidden.{layer}"] = (self.asks.dtype, (sum(of_expert), self.sizes.hidden[layer]))
            if self.asks.embedding is not None:
                specs[f"{k}.{EMBEDDING}"] = (torch.float32, (len(of_expert), self.sizes.embedding))
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
        starts, by_example = cumulated(self.counts[k]), list(range(len(examples) + 1))
        row_starts = self.row_starts(k)
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
                    own = starts if name.startswith("hidden.") else row_starts
                    places = _spans(by_example if name == EMBEDDING else own, torch.tensor(ids))
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
        if outputs.embedding is not None:
            signals[EMBEDDING] = outputs.embedding
        if (temperature := self.asks.temperature) is not None:
            if outputs.kind == "values":
                return signals | {"values": outputs.logits.float()}
            width = self._width(k)
            pieces = [
                _largest(_padded((rows.float() / temperature).log_softmax(-1), self.sizes.logits[k]), width)
                for rows in torch.split(_rows(outputs, batch.mask), ROWS)
            ]
            signals |= {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        return signals

    def row_starts(self, k: int) -> list[int]:
        """The rows of logits of example i: from the i-th number to the next."""
        counts = self.counts[k]
        each = {"spans": 2, "labels": self.sizes.labels[k]}.get(self.sizes.kinds[k], 1)
        return cumulated(counts if self.sizes.kinds[k] == "tokens" else [each] * len(counts))

    def _width(self, k: int) -> int:
        """Recorded probabilities per row: all if they fit into the budget, else as many as fit."""
        if self.sizes.kinds[k] in ("spans", "labels"):
            return self.sizes.logits[k]
        rows = [self.row_starts(j)[-1] for j in range(len(self.counts))]
        if sum(4 * R * V for R, V in zip(rows, self.sizes.logits, strict=True)) <= self.budget:
            return self.sizes.logits[k]
        fitting = self.budget // (8 * sum(rows))  # one float32 and one int32 each
        return max(1, min(self.sizes.logits[k], fitting))


def _rows(outputs: Outputs, mask: Tensor) -> Tensor:
    """The logits' rows [R, V] that are compared."""
    if outputs.kind == "tokens":
        return outputs.logits[mask]
    return outputs.logits.flatten(0, -2)


def _padded(log_p: Tensor, width: int) -> Tensor:
    """Rows of a batch's positions, as wide as those of the longest example."""
    return torch.nn.functional.pad(log_p, (0, width - log_p.shape[-1]), value=-torch.inf)


def _largest(log_p: Tensor, width: int) -> dict[str, Tensor]:
    """The `width` largest of each row, and the mass of the rest."""
    if width == log_p.shape[-1]:
        return {"log_p": log_p}
    top, tokens = log_p.topk(width, dim=-1, sorted=False)
    tail = log_p.scatter(-1, tokens, -torch.inf).logsumexp(dim=-1)
    return {"log_p": top, "tokens": tokens, "tail": tail}
