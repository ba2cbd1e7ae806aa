"""`trainmerge merge`; heavy imports inside, as in `commands`."""

import sys
from pathlib import Path
from typing import Any, Literal

from trainmerge.system.atomic import seen_from
from trainmerge.system.memory import keep_freed_memory


def merge(
    paths: list[str],
    out: str | None = None,
    method: str = "task_arithmetic",
    weight: float | list[float] | None = None,
    density: float | None = None,
    t: float | None = None,
    parameters: dict[str, Any] | None = None,
    tokenizer: str | None = None,
    vocabulary: Literal["same", "shared", "union"] | None = None,
    chat_template: str | None = None,
    rank: int | None = None,
    faithful: bool = False,
    run: str | None = None,
    overwrite: bool = False,
    workers: int = 1,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    shard_size: str | None = None,
) -> None:
    """Merge in one line: a configuration, a mergekit file, or models; the same command resumes.

    Examples: trainmerge merge configs/demo.yaml merged/       fit, export, report
              trainmerge merge mergekit.yml merged/            what mergekit-yaml does
              trainmerge merge BASE EXPERT EXPERT --method ties --weight 0.5 --density 0.2 -o merged/

    Args:
        paths: CONFIG OUT, MERGEKIT_FILE OUT, or BASE EXPERT... with -o OUT, also of diffusers.
        out: The folder to create, also as -o.
        method: With models: linear, slerp, ties, dare_ties, breadcrumbs, ... as in mergekit's files.
        weight: With models: one weight, or a list with one per expert; by default 1 / experts.
        density: With models: the fraction of each task vector to keep.
        t: With models: the point between two models (slerp), or the distance (nearswap).
        parameters: With models: further settings of the method.
        tokenizer: With models: base, an EXPERT, or union; as the key of a recipe.
        vocabulary: With models: same, shared or union; as the key of a recipe.
        chat_template: With models: base, an EXPERT, or what mergekit's files may have.
        rank: With diffusers LoRAs and -o FILE.safetensors: the most singular values per layer.
        faithful: The numbers of mergekit 0.1.5 where it differs by mistake; not with CONFIG.
        run: With CONFIG: the run folder; by default OUT-run.
        overwrite: Replace the folder if it exists.
        workers: Weight files to write in parallel.
        dtype: The dtype of all tensors, rounded once from float32 sums; by default the models'.
        shard_size: Bytes per weight file, such as 5GB.
    """
    keep_freed_memory()
    settings = {"density": density, "t": t, **(parameters or {})}
    given = {key: value for key, value in settings.items() if value is not None}
    of_models: dict[str, Any] = {"--weight": weight, "--density, --t, --parameters": given or None}
    words = {"tokenizer": tokenizer, "vocabulary": vocabulary, "chat_template": chat_template}
    of_models["--rank"] = rank
    of_models |= {f"--{key.replace('_', '-')}": value for key, value in words.items()}
    form: dict[str, Any] = {
        "overwrite": overwrite, "workers": workers, "dtype": dtype, "shard_size": shard_size
    }  # fmt: skip
    if Path(paths[0]).is_dir() or (len(paths) > 1 and _is_model(paths[0])):
        _refuse({"--run": run}, "CONFIG", paths[0])
        form |= {key: value for key, value in {**words, "rank": rank}.items() if value is not None}
        made = _merge_models(paths, out, method, weight, given, faithful, form)
    else:
        of_models["--method"] = method if method != "task_arithmetic" else None
        made = _merge_file(paths, out, of_models, faithful, run, form)
    print(f"merged checkpoint: {made}")


def _merge_models(
    paths: list[str],
    out: str | None,
    method: str,
    weight: Any,
    given: dict[str, Any],
    faithful: bool,
    form: Any,
) -> Path:
    from trainmerge.merging.one_line import merge_models

    base, *experts = paths
    if out is None or not experts:
        raise ValueError("name the base, one expert or more, and the output: BASE EXPERT... -o OUT")
    return merge_models(base, experts, out, method, weight, given, faithful=faithful, **form)


def _merge_file(
    paths: list[str], out: str | None, of_models: dict[str, Any], faithful: bool, run: str | None, form: Any
) -> Path:
    places = [*paths, *([out] if out is not None else [])]
    if not Path(paths[0]).exists():
        raise FileNotFoundError(f"{paths[0]}: neither a file nor a folder{seen_from(paths[0])}")
    if len(places) != 2:
        raise ValueError(f"name a file and the output: trainmerge merge {paths[0]} OUT")
    file, target = Path(places[0]), places[1]
    _refuse(of_models, "models", str(file))
    from trainmerge.merging.one_line import is_mergekit, merge_config

    if is_mergekit(file):
        _refuse({"--run": run}, "CONFIG", str(file))
        from trainmerge.merging.merge_file import merge_file

        return merge_file(file, target, faithful=faithful, **form)
    _refuse({"--faithful": faithful or None}, "a mergekit file or models", str(file))
    from trainmerge.fitting.snapshots import Preempted

    try:
        return merge_config(file, target, run, **form)
    except Preempted as stop:
        print(f"trainmerge merge: {stop}", file=sys.stderr)
        raise SystemExit(stop.code) from stop


def _is_model(path: str) -> bool:
    """Whether a word is a model's id on the hub rather than a file that is not there."""
    from trainmerge.system.hub import is_hub_id

    return is_hub_id(path) and Path(path).suffix not in (".yaml", ".yml")


def _refuse(options: dict[str, Any], kind: str, path: str) -> None:
    """Raise ValueError for an option that would have no effect."""
    if found := [name for name, value in options.items() if value is not None]:
        raise ValueError(f"{found[0]} goes with {kind}, and {path} is not")
