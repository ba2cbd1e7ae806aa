"""What each expert itself predicts on its own calibration examples, recorded once.

An expert is the merge at one-hot coefficients, so no second model is needed: the resident one becomes each
expert in turn. The record is kept in the run folder; a resumed run reads it.

Legend: `K` experts, `N` calibration examples of one, `V` classes.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainmerge.batch import Batch
from trainmerge.forward import Tokenize
from trainmerge.resident import Resident
from trainmerge.storage import MappedFile, write_safetensors

BATCH = 64


def teacher_predictions(
    resident: Resident, texts: Sequence[Sequence[str]], tokenize: Tokenize, folder: Path, depends_on: str
) -> list[Tensor]:
    """Log-probabilities [N, V] of every expert on its own texts, recorded in `folder` unless they are there.

    `depends_on` names what they depend on beside the code; its digest is in the file's name.

    Raises:
        ValueError: an expert has no classification head.
    """
    if any(classifier is None for classifier in resident.classifiers):
        raise ValueError("teachers are recorded through classification heads: give every expert a `head`")
    path = folder / f"teachers-{hashlib.sha256(depends_on.encode()).hexdigest()[:16]}.safetensors"
    if not path.exists():
        _record(resident, texts, tokenize, path)
    file = MappedFile(path)
    return [file.read(str(k)) for k in range(len(texts))]


def _record(resident: Resident, texts: Sequence[Sequence[str]], tokenize: Tokenize, path: Path) -> None:
    predictions = {}
    for k, of_expert in enumerate(texts):
        with resident.merged.teacher(k):
            predictions[str(k)] = _predict(resident, k, of_expert, tokenize)
    path.parent.mkdir(parents=True, exist_ok=True)
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in predictions.items()}
    write_safetensors(path, specs, predictions.items())


@torch.no_grad()
def _predict(resident: Resident, expert: int, texts: Sequence[str], tokenize: Tokenize) -> Tensor:
    """[N, V], in the order of `texts`; run in the order of their lengths, so that little is padded."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows = []
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        inputs = {
            name: tensor.to(resident.device) for name, tensor in tokenize([texts[i] for i in chosen]).items()
        }
        batch = Batch(expert, inputs, inputs["attention_mask"].bool(), torch.tensor(chosen))
        rows.append(resident(batch).logits.float().log_softmax(dim=-1).cpu())
    return torch.cat(rows)[torch.tensor(order).argsort()]
