"""The commands on runs and checkpoints; heavy imports happen inside them, so `--help` is quick."""

from pathlib import Path
from typing import Literal

from trainmerge.cli.adapters import compares_only, export_adapters, refuse
from trainmerge.system.memory import keep_freed_memory


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
    as_: Literal["checkpoint", "adapter", "adapters"] = "checkpoint",
    rank: int | None = None,
    energy: float | None = None,
    rest: Literal["patch", "leave"] | None = None,
    embeddings: bool = False,
) -> None:
    """Write a run's merge as an ordinary checkpoint folder that transformers loads, or as a LoRA adapter.

    Examples: trainmerge export runs/first merged/
              torchrun --nproc-per-node 8 -m trainmerge.cli export runs/first merged/
              trainmerge export runs/first merged/ --verify
              trainmerge export runs/first sentiment/ --task sentiment
              trainmerge export runs/first adapter/ --as adapter --rank 16 --rest patch

    Args:
        run: The run folder.
        out: The folder to create.
        overwrite: Replace the folder if it exists; the old one stays until the new one is complete.
        workers: Shards to write in parallel; their number changes no byte.
        verify: Read the result again and compare it bitwise with the run's merge. An existing folder, without
            `overwrite`, is compared and not written.
        dtype: The dtype of all tensors, rounded once from float32 sums; by default as in the base.
        shard_size: Bytes per weight file, such as 5GB; by default the base's files.
        mergekit: Write the merge as mergekit's YAML to the file OUT, and no weights.
        task: An expert whose own head stands on the merge in the result, a model of that expert's class.
        as_: `adapter` writes the merge as a LoRA on the base, `adapters` each expert as a LoRA on the merge.
        rank: The largest rank of an adapter's module; without rank and energy, LoRA experts are stacked.
        energy: The share of each module's squared norm that an adapter keeps, instead of a rank.
        rest: Write what no LoRA holds to a file of differences, or leave it out; by default it is an error.
        embeddings: Factor the embeddings' changes too.
    """
    keep_freed_memory()
    if as_ != "checkpoint":
        given = {"workers": workers != 1, "shard-size": shard_size, "mergekit": mergekit, "task": task}
        refuse(f"--as {as_}", given)
        from trainmerge.export.adapter_form import AdapterForm

        form = AdapterForm(rank, energy, rest, embeddings, dtype, as_ == "adapters")
        export_adapters(run, out, form, overwrite, verify)
        return
    of_adapters = {"rank": rank, "energy": energy, "rest": rest, "embeddings": embeddings}
    refuse("a checkpoint (--as adapter has one)", of_adapters)
    if mergekit:
        from trainmerge.merging.to_mergekit import to_mergekit

        print(f"mergekit's file: {to_mergekit(run, out)}")
        return
    from trainmerge.export.export import export_run

    if not compares_only(out, overwrite, verify):
        print(f"merged checkpoint: {export_run(run, out, overwrite, workers, None, dtype, shard_size, task)}")
    if verify:
        from trainmerge.export.verify import verify_export

        print(f"{out}: {verify_export(run, out)} tensors are the merge of {run}, bit for bit")


def allocate(
    run: str,
    out: str,
    budget: float = 1.0,
    kappa: float = 1.0,
    by: Literal["magnitude", "energy"] = "magnitude",
) -> None:
    """Allocate chunks to a run's parameters by importance, for a second fit (Expert Merging++).

    Example: trainmerge allocate runs/first chunks.json --budget 1.2 --kappa 1
             trainmerge fit CONFIG runs/second --recipe.grouping.granularity chunk
                 --recipe.grouping.chunks chunks.json --model.initial runs/first/coefficients.safetensors

    Args:
        run: A finished run with one coefficient per parameter.
        out: The JSON file to write.
        budget: Mean chunks per parameter; parameters without chunks keep their coefficient.
        kappa: 0 allocates evenly, 1 in proportion to importance, more concentrates.
        by: Importance: `magnitude` of the merge's change, or measured gradient `energy`.
    """
    from trainmerge.fitting.allocate_chunks import allocate_run

    allocate_run(run, out, budget, kappa, by)


def evaluate(
    path: str,
    recipe: str | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    compare: bool = True,
    output: str | None = None,
    answers: int = 0,
    harness: list[str] | None = None,
    controls: bool = False,
) -> None:
    """Score a run (compared with base, average, task arithmetic and experts) or a checkpoint.

    Examples: trainmerge evaluate runs/first
              trainmerge evaluate merged/ --recipe runs/first
              torchrun --nproc-per-node 2 -m trainmerge.cli evaluate runs/first
              trainmerge evaluate runs/first --harness "[arc_easy, my_task.yaml]"

    Args:
        path: A run folder, or a checkpoint folder.
        recipe: The tasks of a checkpoint: a run folder or a configuration.
        limit: Score the first so many examples of each task only; all by default.
        max_length: Texts are cut at this many tokens; by default as in the recipe's fit, or at 256.
        compare: Score base, average, task arithmetic and experts too; with --no-compare, the merge only.
        output: Write the scores, with all measures, to this JSON file too.
        answers: Answer the test files' column `prompt` with up to this many tokens, and report answer
            lengths.
        harness: Tasks of lm-evaluation-harness: their names, or YAML files of one task each.
        controls: Score a run's merge with random task vectors and with shuffled coefficients too.
    """
    from trainmerge.evaluate.console import evaluate_path

    length, file = max_length or None, Path(output) if output else None
    tasks = harness or ()
    where = Path(path), Path(recipe or path)
    evaluate_path(*where, limit or None, length, compare, file, answers, tasks, controls)


def compare(
    paths: list[str],
    recipe: str | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    output: str | None = None,
) -> None:
    """Score several runs and checkpoints on the same tasks: one table, the best marked.

    Each difference from the best comes with its 95% interval, from a paired bootstrap over the test examples.

    Example: trainmerge compare runs/first runs/second merged/ --recipe runs/first

    Args:
        paths: Run folders and checkpoint folders.
        recipe: The tasks: a run folder or a configuration; by default the first path.
        limit: Score the first so many examples of each task only; all by default.
        max_length: Texts are cut at this many tokens; by default as in the recipe's fit, or at 256.
        output: Write the scores to this JSON file too.
    """
    from trainmerge.evaluate.console import compare_paths

    compare_paths(paths, recipe, limit or None, max_length or None, Path(output) if output else None)


def report(run: str, out: str | None = None) -> None:
    """Write a run's report: one page with coefficients, losses, task vectors, scores; PNG and CSV per figure.

    Example: trainmerge report runs/first

    Args:
        run: The run folder.
        out: The folder to write; by default `report` in the run folder.
    """
    from trainmerge.report import write_report
    from trainmerge.run.folder import RunFolder
    from trainmerge.run.saved import unfinished_line

    page = write_report(run, out or None)
    if line := unfinished_line(RunFolder(Path(run))):
        print(line)
    print(f"report: {page}")
