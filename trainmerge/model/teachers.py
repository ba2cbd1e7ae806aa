"""What each expert itself says about its own calibration examples, recorded once, before the fit.

An expert is the merge at one-hot coefficients, so no second model is needed: the resident one becomes each
expert in turn. The record is a mapped file in the run folder; a resumed run reads it.

Legend: `K` experts, `N` examples of one, `P` counted positions of all of them, `R` rows of logits (`P`, or
`N` under a head), `V` vocabulary or classes, `m` kept ones, `D` hidden size.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from trainmerge.data.batch import Asks, Predictions, Signals
from trainmerge.data.examples import Example
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.model.resident import Resident
from trainmerge.system import distributed
from trainmerge.system.safetensors_file import MappedFile, write_safetensors

TOKENS = 512  # a forward pass at a time; one example where it is longer
ROWS = 32  # of logits widened at a time
BUDGET = 256 << 20  # bytes of recorded probabilities, all experts together


@dataclass(frozen=True)
class Record:
    """One expert's signals, mapped. Rows of example i: starts[i] to starts[i + 1]."""

    parts: Mapping[str, Tensor]
    row_starts: Sequence[int]  # of the logits
    starts: Sequence[int]  # of the counted positions
    layers: tuple[int, ...]

    def of(self, ids: Tensor, device: torch.device) -> Signals:
        """The signals of these examples, in their order."""
        taken = {
            name: _rows(part, self.row_starts, ids).to(device)
            for name, part in self.parts.items()
            if name in Predictions._fields
        }
        predictions = Predictions(**taken) if taken else None
        hidden = {
            layer: _rows(self.parts[f"hidden.{layer}"], self.starts, ids).to(device) for layer in self.layers
        }
        return Signals(predictions, hidden)


def _rows(part: Tensor, starts: Sequence[int], ids: Tensor) -> Tensor:
    """Rows of these examples; of a single one, the mapped file's own."""
    pieces = [part[starts[i] : starts[i + 1]] for i in ids.tolist()]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _spans(starts: Sequence[int], ids: Tensor) -> Tensor:
    return torch.cat([torch.arange(starts[i], starts[i + 1]) for i in ids.tolist()])


def record_teachers(
    resident: Resident,
    examples: Sequence[Sequence[Example]],
    tokenizer: Tokenizer,
    asks: Asks,
    folder: Path,
    depends_on: str,
    budget: int = BUDGET,
) -> list[Record]:
    """What every expert says about its own examples, from `folder` if it is there.

    `depends_on` names what they depend on beside the code; its digest is in the file's name. Probabilities
    are kept whole if all experts' fit into `budget` bytes, else as many of the largest as fit.

    Raises:
        ValueError: an example has no position that counts.
    """
    digest = hashlib.sha256(repr([depends_on, asks, budget]).encode()).hexdigest()[:16]
    path = folder / f"teachers-{digest}.safetensors"
    if not distributed.broadcast(path.exists()):
        _make(path, resident, examples, tokenizer, asks, budget)
    file = MappedFile(path)
    records = [_open(file, k, starts, asks) for k, starts in enumerate(json.loads(file.metadata["starts"]))]
    if distributed.rank() == 0:
        _say_what_is_left_out(records)
    return records


def _make(
    path: Path,
    resident: Resident,
    examples: Sequence[Sequence[Example]],
    tokenizer: Tokenizer,
    asks: Asks,
    budget: int,
) -> None:
    """Run the experts on all processes, and write the file on the first."""
    counts = [_counts(k, own, tokenizer) for k, own in enumerate(examples)]
    sizes = _sizes(resident, tokenizer, asks, examples[0][0])
    recorder = _Recorder(resident, tokenizer, asks, counts, sizes, budget)
    path.parent.mkdir(parents=True, exist_ok=True)
    starts = json.dumps([_cumulated(of_expert) for of_expert in counts])
    if distributed.rank() == 0:
        write_safetensors(path, recorder.specs(), recorder.run(examples), {"starts": starts})
    else:
        deque(recorder.run(examples), maxlen=0)
    distributed.barrier()


def _open(file: MappedFile, k: int, starts: list[int], asks: Asks) -> Record:
    names = [name for name in file.tensors if name.startswith(f"{k}.")]
    parts = {name.partition(".")[2]: file.read(name) for name in names}
    under_head = "log_p" in parts and len(parts["log_p"]) == len(starts) - 1
    return Record(parts, list(range(len(starts))) if under_head else starts, starts, asks.layers)


@torch.no_grad()
def _sizes(resident: Resident, tokenizer: Tokenizer, asks: Asks, example: Example) -> "_Sizes":
    """How wide logits and hidden states are, from one forward pass."""
    outputs = resident(resident.batch(0, [example], tokenizer), asks.layers)
    hidden = {layer: state.shape[-1] for layer, state in outputs.hidden.items()}
    classes = [None if head is None else len(head.weight) for head in resident.classifiers]
    width = outputs.logits.shape[-1]
    return _Sizes([width if classes_ is None else classes_ for classes_ in classes], hidden)


def _counts(expert: int, examples: Sequence[Example], tokenizer: Tokenizer) -> list[int]:
    counts = [int(tokenizer.encode([example]).mask.sum()) for example in examples]
    for i, count in enumerate(counts):
        if not count:
            raise ValueError(
                f"example {i} of expert {expert} has no position that counts in its first "
                f"{tokenizer.max_length} tokens: raise data.max_length, or leave it out"
            )
    return counts


def _cumulated(counts: Sequence[int]) -> list[int]:
    return [0, *torch.tensor(counts).cumsum(0).tolist()]


def _say_what_is_left_out(records: Sequence[Record]) -> None:
    tails = [record.parts["tail"].exp().mean().item() for record in records if "tail" in record.parts]
    if tails:
        m = records[0].parts["log_p"].shape[1]
        print(
            f"teachers: the {m} largest probabilities are kept; the mass of the others is "
            f"{max(tails):.1e} (mean a position, the worst expert), so the gradient with respect to the "
            f"logits is off by {2 * max(tails):.1e} at most, in the 1-norm"
        )


class _Sizes(NamedTuple):
    logits: Sequence[int]  # K: each expert's V
    hidden: Mapping[int, int]  # layer -> D


@dataclass
class _Recorder:
    resident: Resident
    tokenizer: Tokenizer
    asks: Asks
    counts: Sequence[Sequence[int]]  # K lists of counted positions an example
    sizes: _Sizes
    budget: int

    def specs(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of everything that will be written."""
        specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for k, of_expert in enumerate(self.counts):
            if self.asks.temperature is not None:
                rows, width = self._rows(k), self._width(k)
                specs[f"{k}.log_p"] = (torch.float32, (rows, width))
                if width < self.sizes.logits[k]:
                    specs[f"{k}.tokens"] = (torch.int32, (rows, width))
                    specs[f"{k}.tail"] = (torch.float32, (rows,))
            for layer in self.asks.layers:
                specs[f"{k}.hidden.{layer}"] = (torch.bfloat16, (sum(of_expert), self.sizes.hidden[layer]))
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
        """One expert's parts, its rows in the order of `examples`: whole on the first process.

        Each process runs a batch of a round; one that is left without repeats another's: where they share
        the model, the others need it.
        """
        starts = _cumulated(self.counts[k])
        row_starts = list(range(len(examples) + 1)) if self._under_head(k) else starts
        parts: dict[str, Tensor] = {
            name.partition(".")[2]: torch.empty(shape, dtype=dtype)
            for name, (dtype, shape) in self.specs().items()
            if name.startswith(f"{k}.")
        }
        batches = list(self._batches(k))
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

    def _batches(self, k: int) -> Iterator[list[int]]:
        """Example numbers in order of length, so that little is padded."""
        order = sorted(range(len(self.counts[k])), key=lambda i: self.counts[k][i])
        batch: list[int] = []
        for i in order:
            if batch and (len(batch) + 1) * self.counts[k][i] > TOKENS:
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
                _kept((rows.float() / temperature).log_softmax(-1), width)
                for rows in torch.split(logits, ROWS)
            ]
            signals |= {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
        return signals

    def _under_head(self, k: int) -> bool:
        return self.resident.classifiers[k] is not None

    def _rows(self, k: int) -> int:
        return len(self.counts[k]) if self._under_head(k) else sum(self.counts[k])

    def _width(self, k: int) -> int:
        """How many probabilities a row keeps: all if they fit, else what the budget allows."""
        rows = [self._rows(j) for j in range(len(self.counts))]
        if sum(4 * R * V for R, V in zip(rows, self.sizes.logits, strict=True)) <= self.budget:
            return self.sizes.logits[k]
        fitting = self.budget // (8 * sum(rows))  # a float32 and an int32 each
        return max(1, min(self.sizes.logits[k], fitting))


def _kept(log_p: Tensor, width: int) -> dict[str, Tensor]:
    """The `width` largest of each row, and the mass of the rest."""
    if width == log_p.shape[-1]:
        return {"log_p": log_p}
    top, tokens = log_p.topk(width, dim=-1, sorted=False)
    tail = log_p.scatter(-1, tokens, -torch.inf).logsumexp(dim=-1)
    return {"log_p": top, "tokens": tokens, "tail": tail}
