"""From models or a configuration to a merged checkpoint, in one call."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from trainmerge.export.export_once import export_once
from trainmerge.export.form import DtypeName
from trainmerge.fitting.fit import fit
from trainmerge.fitting.from_config import from_config
from trainmerge.merging.document import Document
from trainmerge.merging.located import located
from trainmerge.merging.merge_file import merge_document
from trainmerge.merging.merge_skills import merge_skills
from trainmerge.merging.methods import METHODS
from trainmerge.merging.read_document import check_single
from trainmerge.merging.tokenizer import TokenizerSettings
from trainmerge.report import write_report
from trainmerge.run.config import read_yaml
from trainmerge.system.access import check_folder_place
from trainmerge.system.ranges import check_option

OTHER_FILES = {  # key -> whose file it is
    "gate_mode": "a file of mergekit-moe; `trainmerge export RUN OUT --as moe` makes a mixture of a run",
    "genome": "a file of mergekit-evolve; `trainmerge search CONFIG RUN` searches without gradients",
}


def merge_models(
    base: str | Path,
    experts: Sequence[str | Path],
    out: str | Path,
    method: str = "task_arithmetic",
    weight: float | Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    workers: int = 1,
    faithful: bool = False,
    dtype: DtypeName | None = None,
    shard_size: str | None = None,
    tokenizer: str | None = None,
    vocabulary: Literal["same", "shared", "union"] = "same",
    chat_template: str | None = None,
    rank: int | None = None,
) -> Path:
    """Merge experts of a base by a method of mergekit's files; the base itself is merged by `linear` too.

    Args:
        base: The base model's folder; by `linear` and `karcher`, the first model.
        experts: Folders of models and adapters; of a base of diffusers, its folders and LoRAs.
        out: The folder to create. Of LoRAs of a diffusers pipeline, a `.safetensors` file is one LoRA.
        method: The method's name.
        weight: One weight for all experts, or one each; by default 1 / experts, where the method has weights.
        parameters: Further settings of the method, as in mergekit's files.
        overwrite: Replace the folder if it exists.
        workers: Weight files to write in parallel.
        faithful: As in `merge_file`.
        dtype: The dtype of all tensors; by default the models'.
        shard_size: The most bytes per weight file, such as `5GB`.
        tokenizer: `base`, an expert's folder, or `union`; by default the base's as it is. As in a recipe.
        vocabulary: `same`, `shared` or `union`; as in a recipe.
        chat_template: `base` or an expert's folder; also what `chat_template` of mergekit's files may be.
        rank: Of one LoRA of several, the most singular values per layer; by default all, exactly.

    Raises:
        ValueError: as `merge_file`.
    """
    names = [str(expert) for expert in experts]
    if twice := [name for name in names if names.count(name) > 1 or name == str(base)]:
        raise ValueError(f"{twice[0]} is given twice: name each folder once, and add up its weights")
    source = "union" if vocabulary == "union" and tokenizer is None else tokenizer
    if vocabulary == "union" and source == "base":
        raise ValueError("vocabulary is union, and tokenizer base: leave out one of them")
    file = Path(out).suffix == ".safetensors"
    if rank is not None and not file:
        raise ValueError("rank is of one LoRA of several: name a .safetensors file with -o")
    document = replace(
        _document(str(base), names, method, weight, dict(parameters or {})),
        tokenizer=TokenizerSettings(source, chat_template=chat_template),
        vocabulary="shared" if vocabulary == "shared" else "same",
    )
    if file:
        check_option("rank", rank, int | None, "[1, inf)")
        return merge_skills(located(document), Path(out), overwrite, dtype, rank)
    return merge_document(document, out, overwrite, workers, faithful, dtype, shard_size)


def _document(
    base: str, names: list[str], method: str, weight: float | Sequence[float] | None, settings: dict[str, Any]
) -> Document:
    """The models and settings as a mergekit file would have them."""
    known = METHODS[method].each if method in METHODS else {}  # the document names what is wrong
    merged = [base, *names] if method in ("linear", "karcher") else names
    weights: Sequence[Any] = [None] * len(merged)
    if "weight" in known and "weight" not in settings:
        given = 1 / len(merged) if weight is None else weight
        weights = list(given) if isinstance(given, Sequence) else [given] * len(merged)
    elif weight is not None and method in METHODS:
        raise ValueError(f"{method} has no weights: leave out --weight")
    if len(weights) != len(merged):
        raise ValueError(f"there are {len(weights)} weights for {len(merged)} models: {', '.join(merged)}")
    models = {name: {} if own is None else {"weight": own} for name, own in zip(merged, weights, strict=True)}
    return Document(method, models, None if merged is not names else base, settings)


def merge_config(
    config: str | Path,
    out: str | Path,
    run: str | Path | None = None,
    overwrite: bool = False,
    workers: int = 1,
    dtype: DtypeName | None = None,
    shard_size: str | None = None,
) -> Path:
    """Fit a configuration, export the merge, and write the report. The same call resumes.

    Args:
        config: A configuration of `trainmerge fit`.
        out: The folder of the merged checkpoint.
        run: The run folder; by default the folder `OUT-run` beside `out`.
        overwrite: Replace `out` if it exists.
        workers: Weight files to write in parallel.
        dtype: As in `export_run`.
        shard_size: As in `export_run`.

    Raises:
        ValueError: as `from_config`, `fit` and `export_run`.
        Preempted: a signal stopped the fit; its step is saved.
    """
    target = Path(out)
    check_folder_place(target.parent)  # before the fit
    place = Path(run) if run is not None else target.with_name(f"{target.name}-run")
    settings = from_config(config, place)
    fit(
        settings.module, settings.data, settings.trainer, settings.run, settings.resume,
        config=settings.text, memory=settings.memory,
    )  # fmt: skip
    export_once(place, target, overwrite, workers, dtype, shard_size)
    if settings.report:
        write_report(place)
    return target


def is_mergekit(path: Path) -> bool:
    """Whether a file is a mergekit file rather than a configuration.

    Raises:
        ValueError: it is neither, or has several documents.
    """
    check_single(path)
    content = read_yaml(path)
    keys = set(content) if isinstance(content, Mapping) else set()
    if {"merge_method", "recipe"} & keys:
        return "merge_method" in keys
    if named := [words for key, words in OTHER_FILES.items() if key in keys]:
        raise ValueError(f"{path}: {named[0]}")
    raise ValueError(
        f"{path}: neither a mergekit file (no `merge_method`) nor a configuration of trainmerge (no `recipe`)"
    )
