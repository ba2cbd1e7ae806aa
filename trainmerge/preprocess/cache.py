"""Apply preprocessors in order; each result is cached on disk, except a last one computed by a rule.

Legend: `K` experts, `*S` parameter shape.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from trainmerge.kernels import accumulation_dtype
from trainmerge.preprocess.base import Calibrator, Informed, Preprocess
from trainmerge.preprocess.left_out import announced
from trainmerge.preprocess.piecewise import Piecewise, Rule
from trainmerge.system.safetensors_file import MappedFile, write_safetensors
from trainmerge.system.workspace import cached, digest
from trainmerge.task_vectors.delta import TaskVectors


def apply(
    task_vectors: TaskVectors,
    methods: Sequence[Preprocess],
    folder: Path,
    inputs: str,
    examples: str = "",
    calibrator: Calibrator | None = None,
) -> TaskVectors:
    """Apply the methods in order; each result is cached in `folder` and mapped.

    `inputs` identifies base and experts (their checksums), `examples` the calibration: with the methods'
    fields they name the file.

    Raises:
        ValueError: an informed method's result is not cached, and there is no calibrator to compute it.
    """
    for method, key in zip(methods, _keys(methods, inputs, examples), strict=True):
        file = cached(_path(folder, key), partial(_write, task_vectors, method, calibrator))
        task_vectors = _mapped(file, task_vectors)
    return task_vectors


def apply_for_one_pass(
    task_vectors: TaskVectors, methods: Sequence[Preprocess], folder: Path, inputs: str, examples: str = ""
) -> tuple[TaskVectors, Rule | None]:
    """As `apply`, for task vectors that are read once.

    A last method that is piecewise and not cached is applied by its rule instead.
    """
    made = _path(folder, key_after(methods, inputs, examples))
    if not methods or made.exists() or not isinstance(methods[-1], Piecewise):
        return apply(task_vectors, methods, folder, inputs, examples), None
    before = apply(task_vectors, methods[:-1], folder, inputs, examples)
    return before, methods[-1].rule(before)


def key_after(methods: Sequence[Preprocess], inputs: str, examples: str = "") -> str:
    """The identity of the methods' result: the `inputs` of subsequent methods."""
    *_, key = [inputs, *_keys(methods, inputs, examples)]
    return key


def _keys(methods: Sequence[Preprocess], inputs: str, examples: str) -> Iterator[str]:
    """The identity of each method's result."""
    key = inputs
    for method in methods:
        depends_on = f" {examples}" if isinstance(method, Informed) else ""
        key = digest(f"{key} {method!r}{depends_on}", length=64)
        yield key


def _path(folder: Path, key: str) -> Path:
    return folder / f"task_vectors-{key[:16]}.safetensors"


def _write(task_vectors: TaskVectors, method: Preprocess, calibrator: Calibrator | None, path: Path) -> None:
    names = list(task_vectors.deltas)
    if isinstance(method, Informed) and calibrator is not None:
        names = list(method.changes(task_vectors, calibrator))
    specs = {
        _key(name, expert): (accumulation_dtype(delta.base.dtype), tuple(delta.shape))
        for name, delta in ((name, task_vectors.deltas[name]) for name in names)
        for expert in task_vectors.experts
    }
    tensors = (
        (_key(name, expert), tau)
        for name, taus in announced(method, task_vectors, _results(path, task_vectors, method, calibrator))
        for expert, tau in zip(task_vectors.experts, taus, strict=True)
    )
    write_safetensors(path, specs, tensors, {"method": repr(method)})


def _results(
    path: Path, task_vectors: TaskVectors, method: Preprocess, calibrator: Calibrator | None
) -> Iterator[tuple[str, Tensor]]:
    if isinstance(method, Piecewise):
        return method.in_pieces(task_vectors)
    if not isinstance(method, Informed):
        return method(task_vectors)
    if calibrator is None:
        raise ValueError(
            f"{path}: the result of {type(method).__name__} on the calibration examples is missing; fit again"
        )
    return method.informed(task_vectors, calibrator)


def _mapped(file: MappedFile, task_vectors: TaskVectors) -> TaskVectors:
    return task_vectors.replaced(
        {
            name: [file.read(_key(name, expert)) for expert in task_vectors.experts]
            for name in task_vectors.deltas
            if _key(name, task_vectors.experts[0]) in file.tensors
        }
    )


def _key(name: str, expert: str) -> str:
    return f"{expert}/{name}"
