"""One description for all experts of a configuration: `recipe.each`, with `{name}` for an expert's name.

    recipe:
      each: {path: "experts/{name}", calibration: "texts/{name}.jsonl"}
      experts: [news, movie]

is equivalent to `experts: {news: {path: experts/news, ...}, movie: {path: experts/movie, ...}}`. To give an
expert fields of its own, make `experts` a mapping; its keys replace those of `each`.
"""

import re
from collections.abc import Mapping
from typing import Any

PLACEHOLDER = re.compile(r"\{(\w+)\}")


def expand(config: Any) -> Any:
    """A configuration with `recipe.each` filled in for every expert; unchanged without `recipe.each`.

    Raises:
        ValueError: a placeholder other than `{name}`, an expert without a path, or no experts to describe.
    """
    recipe = config.get("recipe") if isinstance(config, Mapping) else None
    if not isinstance(recipe, Mapping) or "each" not in recipe:
        return config
    each, experts = recipe["each"], recipe.get("experts")
    if not isinstance(each, Mapping):
        raise ValueError(f"recipe.each must be a mapping of an expert's fields, not {each!r}")
    if isinstance(experts, list):
        if strange := [name for name in experts if not isinstance(name, str) or experts.count(name) > 1]:
            raise ValueError(f"recipe.experts must list different names, not {strange[0]!r} among them")
        experts = dict.fromkeys(experts)
    if not isinstance(experts, Mapping) or not experts:
        raise ValueError("recipe.each describes recipe.experts: list their names there, in the same file")
    written = {str(name): _expert(str(name), each, own) for name, own in experts.items()}
    rest = {key: value for key, value in recipe.items() if key != "each"}
    return {**config, "recipe": {**rest, "experts": written}}


def _expert(name: str, each: Mapping[str, Any], own: Any) -> Any:
    """`each` with the name filled in, updated by `own`."""
    if own is not None and not isinstance(own, Mapping):
        raise ValueError(f"recipe.experts.{name} must be a mapping of an expert's fields, not {own!r}")
    filled = _fill({**each, **(own or {})}, name)
    if not filled.get("path"):
        raise ValueError(f"recipe.experts.{name} has no path, and recipe.each gives none")
    return filled


def _fill(value: Any, name: str) -> Any:
    """The value with `{name}` replaced in every string."""
    if isinstance(value, Mapping):
        return {key: _fill(item, name) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item, name) for item in value]
    if not isinstance(value, str):
        return value
    if unknown := [word for word in PLACEHOLDER.findall(value) if word != "name"]:
        raise ValueError(f"recipe.experts.{name}: {value!r} has {{{unknown[0]}}}; only {{name}} is filled in")
    return value.replace("{name}", name)
