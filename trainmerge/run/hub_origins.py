"""Where on the hub base and experts come from: id and commit, recorded in a run's manifest.

A branch moves: a run that was fitted on `org/name` is exported and scored with the commit that it was fitted
on. The manifest's record is outside of what a resumed fit compares; the weights' checksums decide there.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainmerge.run.manifest import LOST
from trainmerge.run.recipe import Recipe
from trainmerge.system.hub import Origin, is_hub_id, origin_of, parse_id
from trainmerge.system.text import shortened

KEY = "hub"  # in manifest.json: name -> {"id": ..., "revision": ...}


def origins(folders: Mapping[str, Path]) -> dict[str, Origin]:
    """`base` and experts -> their place on the hub, of those whose folder is in a hub cache."""
    found = {name: origin_of(folder) for name, folder in folders.items()}
    return {name: origin for name, origin in found.items() if origin is not None}


def recorded_origins(manifest: Mapping[str, Any], where: Path) -> dict[str, Origin]:
    """The record of a manifest, the file `where`; empty without ids and in one of an older version.

    Raises:
        ValueError: it is damaged.
    """
    try:
        made = {str(name): Origin(one["id"], one["revision"]) for name, one in manifest.get(KEY, {}).items()}
        if not all(parse_id(f"{own.id}@{own.revision}") for own in made.values() if "/" in own.id):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{where}: `{KEY}` is {shortened(repr(manifest[KEY]), 200)}, not an id and a revision per "
            f"name. {LOST}"
        ) from error
    return made


def to_json(found: Mapping[str, Origin]) -> dict[str, dict[str, str]]:
    """The record as JSON data."""
    return {name: {"id": origin.id, "revision": origin.revision} for name, origin in found.items()}


def moved_revisions(before: Mapping[str, Origin], now: Mapping[str, Origin]) -> str:
    """One line per model whose id has another commit than at the run's start, with what to write instead."""
    return "\n".join(
        f"  {name}: {then.id} is at commit {now[name].revision} now; write {then.id}@{then.revision}"
        for name, then in before.items()
        if name in now and now[name].id == then.id and now[name].revision != then.revision
    )


def pinned(recipe: Recipe, found: Mapping[str, Origin], paths: bool = False) -> Recipe:
    """The recipe with every id at its recorded commit; with `paths`, folders of a hub cache by their ids too.

    With `paths` it is a recipe for strangers, who have no such folder.
    """

    def at(name: str, path: str) -> str:
        known = name in found and (paths or is_hub_id(path))
        return f"{found[name].id}@{found[name].revision}" if known else path

    experts = {name: replace(expert, path=at(name, expert.path)) for name, expert in recipe.experts.items()}
    return replace(recipe, base=at("base", recipe.base), experts=experts)
