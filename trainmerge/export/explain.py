"""What an export holds besides the model: recipe, coefficients, card and manifest."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from trainmerge.checkpoints.whole import COEFFICIENTS, MANIFEST, RECIPE
from trainmerge.coefficients.coefficients import Coefficients, save_coefficients
from trainmerge.export.adapter_card import adapter_words
from trainmerge.export.adapter_form import AdapterForm, AdapterReport, adapter_record
from trainmerge.export.card_block import make_block
from trainmerge.export.card_run import merge_scores
from trainmerge.export.form import Form
from trainmerge.export.model_card import CardFacts, model_card
from trainmerge.export.public import public, public_config, public_manifest
from trainmerge.run.config import read_yaml, to_config
from trainmerge.run.folder import RunFolder
from trainmerge.run.hub_origins import origins, pinned, to_json
from trainmerge.run.manifest import versions
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.run.saved import check_coefficients
from trainmerge.system.json_file import read_json
from trainmerge.system.safetensors_file import sha256


@dataclass(frozen=True)
class Exported:
    """A run and its merge.

    Args:
        run: The run's folder.
        recipe: Its recipe.
        opened: Its files.
        coefficients: Those of the merge.
        own: Whether they are the run's own, not another point's of its front.
        unfinished: `step 40 of 80` of an unfinished run; empty otherwise.
        task: The expert whose class and own head the checkpoint has; empty for the base's class.
        form: Its dtype and files.
        adapter: What the adapters keep, of an export as such.
        reports: What they lack, one per adapter.
        mixture: Facts of a mixture made of the experts; empty for any other export.
        about: A paragraph on it, for the model card.
    """

    run: RunFolder
    recipe: Recipe
    opened: Opened
    coefficients: Coefficients
    own: bool
    unfinished: str
    task: str = ""
    form: Form = field(default_factory=Form)
    adapter: AdapterForm | None = None
    reports: Sequence[AdapterReport] = ()
    mixture: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""


def explain(folder: Path, name: str, merge: Exported, made: Mapping[str, str]) -> None:
    """Write recipe, coefficients, model card and manifest next to the weights `made`; the manifest last.

    They name no path of this machine. Base and experts from a hub cache are named by id and commit.
    """
    run = merge.run.read_manifest()
    found = origins(merge.opened.folders)
    recipe = pinned(merge.recipe, found, paths=True)
    write_yaml(folder / RECIPE, {"recipe": public(to_config(recipe))})
    save_coefficients(merge.coefficients, folder / COEFFICIENTS)
    if merge.run.config.exists():
        write_yaml(folder / "trainmerge_config.yaml", public_config(read_yaml(merge.run.config)))
    facts = CardFacts(
        name=name,
        recipe=recipe,
        coefficients=merge.coefficients,
        run=run,
        folders=merge.opened.folders,
        config=merge.opened.base.config
        if merge.adapter
        else read_json(folder / "config.json", "Export the run again."),
        sentences=(merge.opened.base.path / "modules.json").is_file(),
        steps=_steps(merge, run),
        unfinished=merge.unfinished,
        scores=merge_scores(merge.run, merge.recipe) if merge.own else None,
        block=replace(
            make_block(made, run["checksums"], folder / COEFFICIENTS, merge.task, merge.form.to_json()),
            adapter=merge.adapter.to_json() if merge.adapter else {},
        ),
        adapter=adapter_words(merge.adapter, merge.reports) if merge.adapter else "",
        mixture=merge.about,
    )
    (folder / "README.md").write_text(model_card(facts), encoding="utf-8")
    more: dict[str, Any] = {"hub": to_json(found)} if found else {}
    more |= {"unfinished": merge.unfinished} if merge.unfinished else {}
    more |= {"task": merge.task} if merge.task else {}
    more |= {"form": merge.form.to_json()} if merge.form.to_json() else {}
    more |= {"mixture": dict(merge.mixture)} if merge.mixture else {}
    if merge.adapter:
        more |= adapter_record(merge.adapter, merge.reports)
    write_export_manifest(folder, made, public_manifest(run), more)


def write_export_manifest(
    folder: Path, made: Mapping[str, str], run: Mapping[str, Any] | None, more: Mapping[str, Any]
) -> None:
    """Write the manifest of an export: versions, SHA-256 of all files, bytes of the weights `made`."""
    others = [
        path for path in folder.rglob("*") if path.is_file() and str(path.relative_to(folder)) not in made
    ]
    files = {**made, **{str(path.relative_to(folder)): sha256(path) for path in others}}
    manifest = {
        "versions": versions(),
        **more,
        "files": dict(sorted(files.items())),
        "bytes": {name: (folder / name).stat().st_size for name in sorted(made)},  # see `check_whole`
        **({"run": run} if run is not None else {}),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))


def write_yaml(path: Path, content: Any) -> None:
    """Plain data as a YAML file."""
    path.write_text(yaml.safe_dump(content, sort_keys=False, width=110))


def _steps(merge: Exported, run: Mapping[str, Any]) -> str:
    """The number of steps taken, or of merges that a search scored; empty if it is unknown."""
    moment = check_coefficients(merge.run, run)
    if moment is None or not merge.own:
        return ""
    what = "evaluation" if merge.run.search.exists() else "step"
    return f"{moment.step} {what}{'' if moment.step == 1 else 's'}"
