"""The model card of a merged checkpoint."""

from collections.abc import Mapping
from typing import Any

import yaml
from torch import Tensor

from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.export.markdown import code, fenced, inline
from trainmerge.export.public import public, public_name
from trainmerge.run.config import to_config
from trainmerge.run.recipe import Recipe
from trainmerge.task_vectors.parameter_names import block_of


def model_card(
    name: str, recipe: Recipe, coefficients: Coefficients, run: Mapping[str, Any], at: str = ""
) -> str:
    """Markdown with the hub's metadata, the coefficients per block, and how to reproduce the merge.

    It names folders, not paths, and no command line: it is for strangers. `at` is the step of an unfinished
    run, such as `step 40 of 80`.
    """
    recipe_text = yaml.safe_dump({"recipe": public(to_config(recipe))}, sort_keys=False, width=110)
    settings = {key: run[key] for key in ("objective", "constraint", "data", "optimizer") if key in run}
    settings_text = yaml.safe_dump(public(settings), sort_keys=False, width=110)
    return f"""---
{yaml.safe_dump(_hub_metadata(recipe), sort_keys=False)}---
# {inline(name)}

A merge of {len(recipe.experts)} experts of {code(public_name(recipe.base))}.
trainmerge learned its coefficients without labels.{f" The run was unfinished: {at}." if at else ""}

## Coefficients

Mean coefficient per block and expert; `trainmerge_coefficients.safetensors` has all of them.

{coefficient_table(coefficients)}

## Reproduce

Fitted with this recipe (`trainmerge_recipe.yaml`; the whole configuration, if the fit had one, is in
`trainmerge_config.yaml`). Absolute paths are replaced by the names of their files and folders.

{fenced(recipe_text, "yaml")}

Settings of the fit (`trainmerge_manifest.json` has all of them, with checksums and versions):

{fenced(settings_text, "yaml")}
"""


def _hub_metadata(recipe: Recipe) -> dict[str, Any]:
    sources = [recipe.base, *(expert.path for expert in recipe.experts.values())]
    return {
        "base_model": [public_name(source) for source in sources],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "trainmerge"],
    }


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
