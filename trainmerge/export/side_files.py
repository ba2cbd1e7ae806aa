"""What travels with an export besides the merged weights: configuration, tokenizer, code, and side modules.

Weights of the base for other runtimes are never copied: another program would load them in place of the
merge. Files are copied by their kind. A subfolder with weights is left out, unless `modules.json` of
sentence-transformers names it as a layer after the model.
"""

import shutil
import warnings
from collections.abc import Collection
from pathlib import Path

from trainmerge.checkpoints import Checkpoint, module_folders
from trainmerge.checkpoints.integrity import TOKENIZER as OF_TOKENIZER
from trainmerge.export.origins import without_local_origins
from trainmerge.system.links import leads_outside
from trainmerge.system.text import listed
from trainmerge.task_vectors.parameter_names import matches

# Of configurations, tokenizers, code and documentation; files without a suffix (LICENSE) are copied too.
COPIED = {
    ".json", ".jsonl", ".txt", ".model", ".spm", ".vocab", ".vcb", ".bpe", ".merges", ".codes", ".tiktoken",
    ".jinja", ".jinja2", ".py", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".md", ".rst", ".csv", ".tsv",
    ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf", ".html", "",
}  # fmt: skip
WEIGHTS = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".hdf5",
    ".keras",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".gguf",
    ".ggml",
    ".ot",
    ".tflite",
    ".npz",
    ".npy",
    ".mlmodel",
    ".mlpackage",
    ".xml",
    ".pb",
    ".data",
    ".pte",
    ".pdparams",
    ".pdmodel",
    ".pdiparams",
    ".params",
    ".engine",
    ".plan",
    ".mnn",
    ".ncnn",
    ".param",
    ".task",
    ".litertlm",
    ".llamafile",
    ".pkl",
    ".pickle",
    ".joblib",
    ".nemo",
    ".zip",
    ".tar",
    ".gz",
    ".distcp",
}  # fmt: skip - "weights" of any runtime, and archives that may contain them
OF_MODULES = {".safetensors", ".bin"}


def copy_side_files(source: Path, target: Path, written: Collection[Path] = ()) -> None:
    """Copy all side files of the checkpoint folder `source`, with subfolders and side modules.

    JSON files lose the local paths that a model was loaded from (`origins`), and nothing else.

    `written` are modules' folders, relative to `source`, whose weights are merged, and in `target` already.

    Warns of links that lead out of `source`, and of files of an unknown kind; they are not copied.
    """
    modules = module_folders(source)
    foreign = _folders_with_weights(source, modules)
    unknown = []
    for path in sorted(source.rglob("*")):
        place = path.relative_to(source)
        if not path.is_file() or _is_hidden(place) or set(place.parents) & foreign:
            continue
        of_module = bool((modules - set(written)).intersection(place.parents)) and place.suffix in OF_MODULES
        if path.suffix.lower() in WEIGHTS and not of_module:
            continue  # of the base, or merged
        if leads_outside(source, path):
            warnings.warn(
                f"{path} is a link that leads out of {source}: it is not copied. If the file belongs to "
                "the checkpoint, copy it there",
                stacklevel=2,
            )
        elif of_module or _is_copied(path, place):
            (target / place).parent.mkdir(parents=True, exist_ok=True)
            _copy(path, target / place)
        elif path.suffix.lower() not in COPIED:
            unknown.append(str(place))
    if unknown:
        warnings.warn(
            f"{source}: {listed(unknown)} is not copied into the export: it may be weights of the base. "
            "If the merge needs it, copy it by hand",
            stacklevel=2,
        )


def copy_base_files(base: Checkpoint, target: Path, written: Collection[Path] = ()) -> None:
    """Copy the side files of a merge's base: with a chosen tokenizer, its files instead of the base's own.

    See `copy_side_files`.
    """
    copy_side_files(base.origin or base.path, target, written)
    if base.origin is None:
        return
    for path in base.origin.iterdir():
        if matches(path.name, OF_TOKENIZER):
            (target / path.name).unlink(missing_ok=True)
    for path in sorted(base.path.iterdir()):
        _copy(path, target / path.name)


def _copy(path: Path, target: Path) -> None:
    if path.suffix.lower() == ".json":
        target.write_bytes(without_local_origins(path.read_bytes()))
    else:
        shutil.copyfile(path, target)


def _folders_with_weights(source: Path, modules: set[Path]) -> set[Path]:
    """Subfolders of the first level with files that are not copied, apart from side modules."""
    places = (path.relative_to(source) for path in source.rglob("*") if path.is_file())
    inner = (place for place in places if len(place.parts) > 1 and not modules.intersection(place.parents))
    return {Path(place.parts[0]) for place in inner if place.suffix.lower() not in COPIED}


def _is_copied(path: Path, place: Path) -> bool:
    """Whether a file is a side file by its name: no weights, index of weights, model card or export's own."""
    name = place.name
    if name == "README.md" and len(place.parts) == 1:
        return False
    if not place.suffix and b"\0" in path.read_bytes()[:8192]:  # LICENSE is text
        return False
    index = name.endswith(".index.json")
    return place.suffix.lower() in COPIED and not index and not name.startswith("trainmerge_")


def _is_hidden(place: Path) -> bool:
    return any(part.startswith(".") for part in place.parts)
