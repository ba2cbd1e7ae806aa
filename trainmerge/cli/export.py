"""The command `export` and its forms; heavy imports happen inside, so `--help` is quick."""

from collections.abc import Mapping
from typing import Any, Literal

from trainmerge.cli.adapters import compares_only, export_adapters
from trainmerge.cli.mixtures import export_moe
from trainmerge.cli.packed import export_packed_experts
from trainmerge.system.memory import keep_freed_memory

OF_ADAPTERS = {"verify", "rank", "energy", "rest", "embeddings"}
TAKES = {  # form -> the options that not all forms have
    "checkpoint": {"verify", "workers", "shard-size", "mergekit", "task"},
    "adapter": OF_ADAPTERS,
    "adapters": OF_ADAPTERS,
    "packed": {"verify", "codec", "budget", "router"},
    "moe": {"verify", "shard-size", "top-k", "routed"},
}


def export(
    run: str,
    out: str,
    overwrite: bool = False,
    workers: int = 1,
    verify: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    shard_size: str | None = None,
    mergekit: bool = False,
    task: str | None = None,
    as_: Literal["checkpoint", "adapter", "adapters", "packed", "moe"] = "checkpoint",
    rank: int | None = None,
    energy: float | None = None,
    rest: Literal["patch", "leave"] | None = None,
    embeddings: bool = False,
    codec: str | None = None,
    budget: str | None = None,
    router: bool = False,
    top_k: int | None = None,
    routed: float | None = None,
) -> None:
    """Write a run's merge as a checkpoint for transformers, as a LoRA or a mixture; or pack its experts.

    Examples: trainmerge export runs/first merged/ --verify
              trainmerge export runs/first sentiment/ --task sentiment
              trainmerge export runs/first adapter/ --as adapter --rank 16 --rest patch
              trainmerge export runs/first packed/ --as packed --codec mask

    Args:
        run: The run folder.
        out: The folder to create.
        overwrite: Replace the folder when the new one is complete.
        workers: Shards to write in parallel; changes no byte.
        verify: Compare the result bitwise with the run's merge.
        dtype: Of all tensors, rounded once; by default the base's.
        shard_size: Bytes per file, such as 5GB; by default the base's.
        mergekit: Write mergekit's YAML to the file OUT, no weights.
        task: The expert whose own head stands on the merge.
        as_: A LoRA; a LoRA per expert; experts for `unpack`; a mixture.
        rank: The largest rank; LoRA experts are stacked without it.
        energy: The share of squared norm to keep, instead of a rank.
        rest: What no LoRA holds: in a file of differences, or left out.
        embeddings: Factor the embeddings' changes too.
        codec: mask, emr, lowrank, twin, ternary or pca; lowrank:16.
        budget: Bytes, 20MB, or models, 1.5, with the base in them.
        router: Fit a classifier of texts to tasks too.
        top_k: Experts of a mixture for each token, 2 by default.
        routed: Share of Qwen2's routed experts, 0.5 by default.
    """
    keep_freed_memory()
    given = {"verify": verify, "workers": workers != 1, "shard-size": shard_size, "mergekit": mergekit,
             "task": task, "rank": rank, "energy": energy, "rest": rest, "embeddings": embeddings,
             "codec": codec, "budget": budget, "router": router, "top-k": top_k,
             "routed": routed}  # fmt: skip
    _refuse_others(as_, given)
    if as_ == "packed":
        export_packed_experts(run, out, codec, budget, dtype, router, overwrite, verify)
    elif as_ == "moe":
        experts, share = 2 if top_k is None else top_k, 0.5 if routed is None else routed
        export_moe(run, out, experts, share, overwrite, verify, dtype, shard_size)
    elif as_ != "checkpoint":
        from trainmerge.export.adapter_form import AdapterForm

        form = AdapterForm(rank, energy, rest, embeddings, dtype, as_ == "adapters")
        export_adapters(run, out, form, overwrite, verify)
    elif mergekit:
        from trainmerge.merging.to_mergekit import to_mergekit

        print(f"mergekit's file: {to_mergekit(run, out)}")
    else:
        _export_checkpoint(run, out, overwrite, workers, verify, dtype, shard_size, task)


def _refuse_others(form: str, given: Mapping[str, Any]) -> None:
    """Raise ValueError for options of other forms."""
    if wrong := [name for name, value in given.items() if _is_set(value) and name not in TAKES[form]]:
        others = " or ".join(f"--as {other}" for other, own in TAKES.items() if wrong[0] in own)
        raise ValueError(f"--{wrong[0]} does not apply to --as {form}, but to {others}: leave it out")


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


def _export_checkpoint(
    run: str,
    out: str,
    overwrite: bool,
    workers: int,
    verify: bool,
    dtype: Literal["float32", "bfloat16", "float16"] | None,
    shard_size: str | None,
    task: str | None,
) -> None:
    from trainmerge.export.export import export_run

    if not compares_only(out, overwrite, verify):
        print(f"merged checkpoint: {export_run(run, out, overwrite, workers, None, dtype, shard_size, task)}")
    if verify:
        from trainmerge.export.verify import verify_export

        print(f"{out}: {verify_export(run, out)} tensors are the merge of {run}, bit for bit")
