"""One mixture of experts -> one with fewer: `trainmerge shrink`."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from trainmerge.checkpoints import Checkpoint, check_tensors
from trainmerge.data.columns import Columns
from trainmerge.data.examples import Example, read_examples
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.export.export import write_checkpoint
from trainmerge.export.form import write_settings
from trainmerge.mixtures.camera import expert_energies
from trainmerge.mixtures.groups import (
    FILE,
    METHODS,
    OUTPUTS,
    USAGE,
    method_of,
    plan_groups,
    read_groups,
    write_groups,
)
from trainmerge.mixtures.layers import MixtureLayer, mixture_layers, routed_part, shrunk_settings
from trainmerge.mixtures.learn_groups import Student, learn_layer, students_of
from trainmerge.mixtures.open_mixture import open_mixture
from trainmerge.mixtures.saliency import Saliency, measure
from trainmerge.mixtures.shrunk import Shrunk
from trainmerge.system.console import progress
from trainmerge.system.ranges import check_option
from trainmerge.system.staging import staging

LENGTH = 512  # tokens of a text, by default


def shrink(
    checkpoint: str | Path,
    out: str | Path,
    experts: int,
    calibration: str | None = None,
    plan: str = "reap",
    max_length: int = LENGTH,
    max_examples: int | None = None,
    steps: int = 0,
    rank: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a mixture with fewer experts per layer, which transformers loads as it loads the larger one.

    Kept experts keep their rows of the router; others are dropped, or merged into the nearest kept one, with
    their neurons in its order. Shared experts and all other tensors are copies. The plan is written beside
    the weights, as `trainmerge_groups.json`.

    Args:
        checkpoint: A mixture: a folder, or an id on the hub.
        out: The folder to create.
        experts: Experts of every layer after.
        calibration: Unlabeled texts: a JSONL, CSV, parquet or text file. Not needed for a plan in which every
            group is one expert.
        plan: `reap` or `camera` (drop), `ream` or `m-smoe` (merge the nearest), `hc` or `sub-moe` (merge
            clusters), `dern` (merge single neurons), or a JSON file of groups.
        max_length: Texts are truncated to this many tokens.
        max_examples: Use the first so many texts.
        steps: Steps of learning the merged experts' coefficients and the router's rows, layer by layer,
            instead of taking saliencies and rows as they are. In every layer the result is kept only where it
            is better than dropping.
        rank: In the plan `sub-moe`, project each merged matrix onto so many directions of its group's.
        overwrite: Replace `out` if it exists.

    Raises:
        FileExistsError: `out` exists and `overwrite` is not set.
        ValueError: a dense model, experts of another form than gate, up and down, a number of experts that
            the router cannot have, no texts, or a plan that does not fit; before anything is written.
    """
    check_option("experts", experts, int, "[1, inf)")
    check_option("max_length", max_length, int, "[1, inf)")
    check_option("max_examples", max_examples, int | None, "[1, inf)")
    check_option("steps", steps, int, "[0, inf)")
    check_option("rank", rank, int | None, "[1, inf)")
    base = open_mixture(checkpoint)
    layers = mixture_layers(base)
    settings = shrunk_settings(base.path, base.config, experts)
    parts, method = int(routed_part(base.config).get("n_group") or 1), method_of(plan)
    given = None if plan in METHODS else read_groups(Path(plan), layers, experts, parts)
    _check_options(base.path, plan, method, steps, rank, parts)
    singles = given is not None and all(len(group) == 1 for own in given.values() for group in own)
    reads = bool(steps) or method == "dern" or not singles
    if calibration is None and reads:
        raise ValueError(f"the plan {plan!r} needs texts: --calibration FILE")
    _check_out(Path(out), base.path, overwrite)
    with staging(out, overwrite) as folder:
        write_settings(folder, settings)
        first = {layer.prefix: [[number] for number in range(experts)] for layer in layers}
        module, names = check_tensors(folder, Shrunk(base, layers, first).tensors)
        texts = _texts(base, calibration, max_length, max_examples) if calibration and reads else None
        measured = {} if texts is None else measure(base, layers, *texts, every=plan in OUTPUTS)
        groups = given or {
            layer.prefix: _planned(plan, base, layer, measured[layer.prefix], experts, parts)
            for layer in layers
        }
        weights = "usage" if method in USAGE else "saliency"
        made = Shrunk(base, layers, groups, measured, {}, weights, rank, method == "dern")
        errors: dict[str, dict[str, float]] = {}
        if steps:
            made, errors = _learned(made, students_of(module, names, layers), steps)
        write_checkpoint(made, folder)
        write_settings(folder, settings)
        write_groups(folder / FILE, method, experts, groups, errors)
    return Path(out)


def _learned(
    made: Shrunk, students: Mapping[str, Student], steps: int
) -> tuple[Shrunk, dict[str, dict[str, float]]]:
    """The same with learned coefficients, and every layer's errors."""
    found, errors = {}, {}
    layers = {layer.prefix: layer for layer in made.layers}
    for prefix in progress(list(layers), "learning groups"):
        found[prefix], own = learn_layer(made, layers[prefix], students[prefix], steps)
        errors[prefix] = asdict(own)
    return replace(made, learned=found), errors


def _planned(
    plan: str, base: Checkpoint, layer: MixtureLayer, own: Saliency, experts: int, parts: int
) -> list[list[int]]:
    """The groups of one layer."""
    scores = expert_energies(base, layer, own) if plan == "camera" else None
    return plan_groups(plan, own, experts, parts, scores)


def _check_options(where: Path, plan: str, method: str, steps: int, rank: int | None, parts: int) -> None:
    """Raise ValueError for options that the plan does not have."""
    if plan in OUTPUTS and parts > 1:
        raise ValueError(
            f"{where}: its routers have groups, of which {plan} does not keep equally many experts"
        )
    if rank is not None and method != "sub-moe":
        raise ValueError(
            f"--rank is for the plan sub-moe, and this one merges as {method} does: leave it out"
        )
    if steps and (rank is not None or method == "dern"):
        raise ValueError(
            "--steps learns sums of whole experts: leave out --rank, and take another plan than dern"
        )


def _check_out(out: Path, base: Path, overwrite: bool) -> None:
    """Raise ValueError if writing `out` would remove the mixture itself, or a folder that is none of ours."""
    if base.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out} is, or holds, the mixture that is shrunk: name another folder")
    if overwrite and out.is_dir() and any(out.iterdir()) and not (out / FILE).is_file():
        raise ValueError(f"{out} is no folder that `trainmerge shrink` wrote: name another, or remove it")


def _texts(
    base: Checkpoint, calibration: str, max_length: int, most: int | None
) -> tuple[list[Example], Tokenizer]:
    tokenizer = Tokenizer(str(base.path), max_length)
    if not (found := read_examples(calibration, Columns(), tokenizer.render, most)):
        raise ValueError(f"{calibration}: no texts")
    if not bool(tokenizer.encode(found[:1]).inputs["attention_mask"].any()):
        raise ValueError(
            f"{base.path}: its tokenizer finds no token in the first text of {calibration}: is it there?"
        )
    return found, tokenizer
