"""The model card of a merged checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.export.adapter_card import adapter_metadata
from trainmerge.export.card_block import Block, block_text
from trainmerge.export.card_metadata import Scores, hub_metadata, licence_words
from trainmerge.export.card_run import fit_settings, last_command, papers
from trainmerge.export.card_sources import Source, card_sources
from trainmerge.export.markdown import code, code_block, inline
from trainmerge.export.public import public
from trainmerge.run.config import to_config
from trainmerge.run.recipe import Recipe
from trainmerge.task_vectors.parameter_names import block_of

OF_CARD = (
    "This card is enough where all models are on the hub, and no method reads calibration texts: `trainmerge "
    "rebuild README.md OUT` merges again and compares the files."
)
OF_RUN = (
    "The routers read calibration texts: `trainmerge export RUN OUT --as moe` makes it again from the run."
)


@dataclass(frozen=True)
class CardFacts:
    """What a card tells.

    Args:
        name: The model's.
        recipe: With ids and commits of the hub where they are known.
        coefficients: Those of the merge.
        run: The run's manifest.
        folders: `base` and every expert.
        config: The base's config.json.
        sentences: Whether it is a model of sentence-transformers.
        steps: `80 steps`, or `100 evaluations`; empty if unknown.
        unfinished: `step 40 of 80` of an unfinished run; empty otherwise.
        scores: Of the merge, if `evaluate` has run.
        block: What `trainmerge rebuild` needs.
        adapter: How to load it, of an adapter; empty for a checkpoint.
        mixture: What it is made of, of a mixture of the experts; empty for any other.
    """

    name: str
    recipe: Recipe
    coefficients: Coefficients
    run: Mapping[str, Any]
    folders: Mapping[str, Path]
    config: Mapping[str, Any]
    sentences: bool
    steps: str
    unfinished: str
    scores: Scores | None
    block: Block
    adapter: str = ""
    mixture: str = ""


def model_card(facts: CardFacts) -> str:
    """Markdown with the hub's metadata, the coefficients per block, and how to reproduce the merge.

    It is for strangers: it names folders, not paths.
    """
    recipe_text = yaml.safe_dump({"recipe": public(to_config(facts.recipe))}, sort_keys=False, width=110)
    sources = card_sources(facts.recipe, facts.folders)
    head = hub_metadata(facts.name, sources, facts.config, facts.sentences, facts.scores)
    if facts.adapter:
        head = adapter_metadata(head, facts.block.adapter, sources)
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, width=110)}---\n# {inline(facts.name)}",
        _first_words(facts, sources),
        facts.adapter,
        facts.mixture,
        _source_table(sources),
        licence_words(sources),
        "## Coefficients\n\nMean coefficient per block and expert; `trainmerge_coefficients.safetensors` has "
        f"all of them.\n\n{coefficient_table(facts.coefficients)}",
        _paper_words(facts),
        f"## Reproduce\n\n{OF_RUN if facts.mixture else OF_CARD} Absolute paths are replaced by the names of "
        "their files and folders.",
        code_block(recipe_text, "yaml"),
        _command_words(last_command(facts.run)),
        "Settings of the fit (`trainmerge_manifest.json` has all of them, with checksums and versions):\n\n"
        + code_block(fit_settings(facts.run), "yaml"),
        "" if facts.mixture else block_text(facts.block),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _first_words(facts: CardFacts, sources: list[Source]) -> str:
    learned = facts.steps and not facts.steps.startswith("0 ")
    how = f"trainmerge learned its coefficients without labels, in {facts.steps}." if learned else (
        "Its coefficients were not learned: no steps were taken." if facts.steps else
        "trainmerge learned its coefficients without labels."
    )  # fmt: skip
    unfinished = f" The run was unfinished: {facts.unfinished}." if facts.unfinished else ""
    return f"A merge of {len(facts.recipe.experts)} experts of {code(sources[0].label)}.\n{how}{unfinished}"


def _source_table(sources: list[Source]) -> str:
    """Name, model, commit and licence of base and experts."""
    lines = [_row("name", ["model", "commit", "licence"]), _row("---", ["---"] * 3)]
    lines += [
        _row(
            inline(source.name),
            [
                code(source.label),
                code(source.origin.revision) if source.origin else "",
                code(source.licence or "not named"),
            ],
        )
        for source in sources
    ]
    return "\n".join(lines)


def _paper_words(facts: CardFacts) -> str:
    found = papers(facts.recipe, facts.run, learned=not facts.steps.startswith("0 "))
    if not found:
        return ""
    lines = [
        f"- {name}: " + ", ".join(f"[arXiv {n}](https://arxiv.org/abs/{n})" for n in numbers)
        for name, numbers in found.items()
    ]
    return "\n".join(["## Methods", "", *lines])


def _command_words(command: str) -> str:
    return f"The fit's last command:\n\n{code_block(command + chr(10), 'sh')}" if command else ""


def coefficient_table(coefficients: Coefficients) -> str:
    """Mean coefficients as a Markdown table: one row per block, one column per expert."""
    blocks: dict[str, list[int]] = {}
    for parameter, groups in coefficients.layout.groups.items():
        blocks.setdefault(block_of(parameter), []).extend(groups)
    values = coefficients().detach()
    lines = [
        _row("block", [inline(name) for name in coefficients.experts]),
        _row("---", ["---"] * len(coefficients.experts)),
    ]
    lines += [_row(code(block), _means(values[:, groups])) for block, groups in blocks.items()]
    return "\n".join([*lines, _row("all", _means(values))])


def _means(values: Tensor) -> list[str]:
    return [f"{mean:.3f}" for mean in values.mean(dim=1).tolist()]


def _row(first: str, cells: list[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"
