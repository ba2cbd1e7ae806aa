"""Mixtures of experts: the command `shrink`, and `export --as moe`; heavy imports happen inside."""

from pathlib import Path
from typing import Literal

from trainmerge.cli.adapters import compares_only
from trainmerge.system.memory import keep_freed_memory


def shrink(
    checkpoint: str,
    out: str,
    experts: int | None = None,
    calibration: str | None = None,
    plan: str = "reap",
    max_length: int = 512,
    max_examples: int | None = None,
    steps: int = 0,
    rank: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write a mixture of experts with fewer experts per layer.

    Examples: trainmerge shrink mixture/ smaller/ --experts 96 --calibration texts.jsonl
              trainmerge shrink mixture/ smaller/ --experts 96 --calibration texts.jsonl --plan ream
              trainmerge shrink mixture/ again/ --experts 96 --plan smaller/trainmerge_groups.json

    Args:
        checkpoint: A mixture: a folder, or an id on the hub.
        out: The folder to create.
        experts: Experts of every layer after.
        calibration: A file of unlabeled texts.
        plan: `reap` and `camera` drop experts, `ream` and `m-smoe` merge each into the most similar kept one,
            `hc` and `sub-moe` merge clusters of outputs, `dern` single neurons; or a JSON file of groups.
        max_length: Texts are cut at this many tokens.
        max_examples: Use the first so many texts.
        steps: Learn the merged experts' coefficients and the router's rows in so many steps a layer.
        rank: With `sub-moe`: project each merged matrix onto so many directions of its group's.
        overwrite: Replace the folder if it exists.
    """
    if experts is None:
        raise ValueError("--experts is missing: the number of experts of every layer after")
    keep_freed_memory()
    from trainmerge.mixtures.shrink import shrink as shrink_mixture

    made = shrink_mixture(
        checkpoint, out, experts, calibration, plan, max_length, max_examples, steps, rank, overwrite
    )
    if steps:
        print_errors(made)
    print(f"mixture of {experts} experts per layer: {made}")


def print_errors(folder: Path) -> None:
    """Print every layer's error on held-out tokens: members dropped, merged by saliency, learned."""
    from trainmerge.mixtures.groups import read_errors
    from trainmerge.system.console import print_table

    errors = read_errors(folder)
    rows = [[layer, *(f"{error:.4f}" for error in own.values())] for layer, own in errors.items()]
    means = [sum(own[key] for own in errors.values()) / len(errors) for key in next(iter(errors.values()))]
    header = ["layer", *next(iter(errors.values()))]
    print_table(
        "relative error of the routed output on held-out tokens",
        header,
        [*rows, ["mean", *(f"{mean:.4f}" for mean in means)]],
    )


def export_moe(
    run: str,
    out: str,
    top_k: int,
    routed: float,
    overwrite: bool,
    verify: bool,
    dtype: Literal["float32", "bfloat16", "float16"] | None,
    shard_size: str | None,
) -> None:
    """`trainmerge export --as moe`."""
    from trainmerge.mixtures.upcycle import export_mixture, verify_mixture

    if not compares_only(out, overwrite, verify):
        print_mixture(export_mixture(run, out, top_k, routed, overwrite, dtype, shard_size))
    if verify:
        count = verify_mixture(run, out)
        print(f"{out}: {count} tensors are the mixture of {run}, bit for bit, with the routers as they are")


def print_mixture(folder: Path) -> None:
    """Print each layer's router, and how near the mixture and the merge are to the experts."""
    from trainmerge.mixtures.facts import mixture_facts
    from trainmerge.system.console import print_table

    facts = mixture_facts(folder)
    rows = [[layer, f"{share:.3f}"] for layer, share in facts["accuracy"].items()]
    print_table(
        "held-out tokens that go to their own expert first", ["layer", f"of {facts['experts']} experts"], rows
    )
    loss = facts["divergence"]
    print(
        f"from the experts on held-out texts, nats per token: merge {loss['merge']:.4f}, mixture "
        f"{loss['mixture']:.4f} (routers times {facts['temperature']:g})"
    )
    print(f"{facts['family']} of {facts['experts']} experts, {facts['top_k']} for each token: {folder}")
