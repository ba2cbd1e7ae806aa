"""Each expert's outputs on its own calibration examples, recorded once, before the fit.

An expert is the merge at one-hot coefficients, so no second model is needed: the resident model becomes each
expert in turn. The record is a mapped file in the run folder; a resumed run reuses it.

Legend: `K` experts, `P` counted positions of all examples of one, `V` vocabulary or classes.
"""

import json
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainmerge.data.batch import Asks, Predictions, Signals
from trainmerge.data.examples import Example
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.model.output_sizes import count_positions, output_sizes
from trainmerge.model.own_head import OwnModel
from trainmerge.model.resident import Resident
from trainmerge.model.teacher_recorder import EMBEDDING, Recorder, cumulated
from trainmerge.system import distributed
from trainmerge.system.safetensors_file import MappedFile, write_safetensors
from trainmerge.system.workspace import digest, metadata_of, open_cached

BUDGET = 256 << 20  # bytes of recorded probabilities, of all experts


@dataclass(frozen=True)
class Record:
    """One expert's recorded outputs, mapped. Rows of example i: starts[i] to starts[i + 1]."""

    parts: Mapping[str, Tensor]
    row_starts: Sequence[int]  # of the logits
    starts: Sequence[int]  # of the counted positions
    layers: tuple[int, ...]

    def of(self, ids: Tensor, device: torch.device) -> Signals:
        """The recorded outputs of these examples, in order."""
        taken = {
            name: _rows(part, self.row_starts, ids).to(device)
            for name, part in self.parts.items()
            if name in Predictions._fields
        }
        predictions = Predictions(**taken) if taken else None
        hidden = {
            layer: _rows(self.parts[f"hidden.{layer}"], self.starts, ids).to(device) for layer in self.layers
        }
        values, embedding = self.parts.get("values"), self.parts.get(EMBEDDING)
        numbers = None if values is None else _rows(values, self.row_starts, ids).to(device)
        return Signals(predictions, hidden, numbers, None if embedding is None else embedding[ids].to(device))


def _rows(part: Tensor, starts: Sequence[int], ids: Tensor) -> Tensor:
    """Rows of these examples; for a single example, a view of the mapped file."""
    pieces = [part[starts[i] : starts[i + 1]] for i in ids.tolist()]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def record_teachers(
    resident: Resident,
    examples: Sequence[Sequence[Example]],
    tokenizer: Tokenizer,
    asks: Asks,
    folder: Path,
    depends_on: str,
    budget: int = BUDGET,
) -> list[Record]:
    """Every expert's outputs on its own examples, read from `folder` if recorded there.

    `depends_on` describes everything the outputs depend on; its digest is in the file's name. All
    probabilities are recorded if they fit into `budget` bytes, else as many of the largest per row as fit.

    Raises:
        ValueError: an example has no unmasked position, or the record is damaged.
    """
    identity = digest(f"[{depends_on!r}, {asks.identity()}, {budget!r}]")
    path = folder / f"teachers-{identity}.safetensors"
    if not distributed.broadcast(path.exists()):
        _make(path, resident, examples, tokenizer, asks, budget)
    file = open_cached(path)
    starts = metadata_of(file, "starts")
    rows = metadata_of(file, "row_starts") if file.metadata.get("row_starts") else [None] * len(starts)
    records = [_open(file, k, starts[k], rows[k], asks) for k in range(len(starts))]
    if distributed.rank() == 0:
        _print_left_out(records)
    return records


def _make(
    path: Path,
    resident: Resident,
    examples: Sequence[Sequence[Example]],
    tokenizer: Tokenizer,
    asks: Asks,
    budget: int,
) -> None:
    """Run the experts on all processes; the first one writes the file.

    Not `system.workspace.cached`, where each process looks for the file and makes it alone. Here all ranks
    take part in the recording, because collectives of a sharded model need all of them: rank 0 looks for
    the file, and all wait until it is written.
    """
    counts = [count_positions(resident, k, own, tokenizer) for k, own in enumerate(examples)]
    sizes = output_sizes(resident, tokenizer, asks, examples)
    recorder = Recorder(resident, tokenizer, asks, counts, sizes, budget)
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"starts": json.dumps([cumulated(of_expert) for of_expert in counts])}
    if any(isinstance(head, OwnModel) for head in resident.classifiers):
        told["row_starts"] = json.dumps([recorder.row_starts(k) for k in range(len(counts))])
    if distributed.rank() == 0:
        write_safetensors(path, recorder.specs(), recorder.run(examples), told)
    else:
        deque(recorder.run(examples), maxlen=0)
    distributed.barrier()


def _open(file: MappedFile, k: int, starts: list[int], rows: list[int] | None, asks: Asks) -> Record:
    names = [name for name in file.tensors if name.startswith(f"{k}.")]
    parts = {name.partition(".")[2]: file.read(name) for name in names}
    under_head = "log_p" in parts and len(parts["log_p"]) == len(starts) - 1
    rows = rows or (list(range(len(starts))) if under_head else starts)
    return Record(parts, rows, starts, asks.layers)


def _print_left_out(records: Sequence[Record]) -> None:
    tails = [record.parts["tail"].exp().mean().item() for record in records if "tail" in record.parts]
    if tails:
        m = records[0].parts["log_p"].shape[1]
        print(
            f"teachers: the {m} largest probabilities per position are recorded; the others have a mean mass "
            f"of {max(tails):.1e} (worst expert), so the error of the gradient with respect to the logits is "
            f"at most {2 * max(tails):.1e} in the 1-norm"
        )
