"""A run's merge as a LoRA adapter on the base, or its experts as adapters on the merge."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainmerge.checkpoints.whole import export_manifest
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.export.adapter import write_adapter
from trainmerge.export.adapter_form import AdapterForm, AdapterReport
from trainmerge.export.adapter_source import AdapterSource
from trainmerge.export.card_sources import base_origin, card_sources
from trainmerge.export.explain import explain
from trainmerge.export.export import begin_export, check_no_buffers, merge_of
from trainmerge.export.merge_changes import expert_changes, merge_changes
from trainmerge.export.shards import CheckpointMerge
from trainmerge.run.folder import RunFolder
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.system import distributed
from trainmerge.system.distributed import joined
from trainmerge.system.shared_output import agreed, staging_shared


@dataclass(frozen=True)
class AdapterMerge:
    """A merge, and the adapters that are written of it.

    Args:
        merge: The merge.
        opened: Its files.
        recipe: Its recipe.
        form: What the adapters keep.
    """

    merge: CheckpointMerge
    opened: Opened
    recipe: Recipe
    form: AdapterForm

    def write(self, folder: Path) -> tuple[list[AdapterReport], dict[str, str]]:
        """Write one adapter, or a subfolder per expert; returns reports, and file -> SHA-256.

        Raises:
            ValueError: as `write_adapter`, or an expert whose name is no folder's.
        """
        from trainmerge.checkpoints import lora_targets  # imports transformers and peft

        targets = lora_targets(self.merge.base, self.opened.ignore)
        if not self.form.each:
            base_id = base_origin(card_sources(self.recipe, self.opened.folders))
            source = AdapterSource(self.merge.base, targets, merge_changes(self.merge), base_id)
            report, files = write_adapter(source, self.form, folder)
            return [report], files
        reports: list[AdapterReport] = []
        made: dict[str, str] = {}
        self._check_names()
        for number, name in enumerate(self.merge.coefficients.experts):
            changes = expert_changes(self.merge, self.opened.task_vectors, number)
            source = AdapterSource(self.merge.base, targets, changes, label=f"the expert {name}")
            (folder / name).mkdir()
            report, files = write_adapter(source, self.form, folder / name)
            reports.append(replace(report, place=name))
            made |= {f"{name}/{file}": digest for file, digest in files.items()}
        return reports, made

    def _check_names(self) -> None:
        bad = [name for name in self.merge.coefficients.experts if set(name) & set("/\\") or name[0] == "."]
        if bad:
            raise ValueError(f"experts {bad}: not names of folders; rename them in the recipe and fit again")


def export_adapter(
    run: str | Path,
    out: str | Path,
    form: AdapterForm | None = None,
    overwrite: bool = False,
    coefficients: Coefficients | None = None,
) -> Path:
    """Write a run's merge as a LoRA adapter that peft loads on the base.

    A merge of LoRA experts is exact without a rank: their factors are stacked, and the coefficients multiply
    rows. Any other is cut from its singular values. Ranks and errors are in the manifest and on the card.

    Args:
        run: The run's folder.
        out: The folder to create; with `form.each`, it has one folder per expert.
        form: Rank or energy, what becomes of changes that no LoRA holds, and the dtype.
        overwrite: Replace `out` if it exists.
        coefficients: Replace the run's own.

    Raises:
        FileExistsError: `out` exists and `overwrite` is not set.
        ValueError: as `export_run`; or changes that no LoRA holds, or dense ones, without a choice in `form`.
    """
    run_folder, target, form = RunFolder(Path(run)), Path(out), form or AdapterForm()
    reports: list[AdapterReport] = []
    with joined():
        exported = begin_export(run_folder, target, coefficients)
        recipe, opened = exported.recipe, exported.opened
        with staging_shared(target, overwrite) as folder, agreed():
            with distributed.rank_zero_first():
                merge = merge_of(run_folder, recipe, exported.coefficients, opened)
            check_no_buffers(merge, run_folder)
            if distributed.rank() == 0:
                reports, made = AdapterMerge(merge, opened, recipe, form).write(folder)
                explain(folder, target.name, replace(exported, adapter=form, reports=reports), made)
    warn_of_errors(reports)
    return target


def warn_of_errors(reports: Sequence[AdapterReport]) -> None:
    """Warn of each adapter whose error is large, and name the worst modules."""
    for report in reports:
        if report.worst:
            place = f"{report.place}: " if report.place else ""
            warnings.warn(
                f"{place}the adapter misses {report.error:.1%} of the change, most of it in {report.worst}; "
                "a larger rank, or a share of energy nearer to 1, misses less",
                stacklevel=3,
            )


def adapter_manifest(folder: Path) -> dict[str, Any]:
    """An export's manifest, for the command line; empty for another folder."""
    return export_manifest(folder)


def adapter_of(folder: Path) -> AdapterForm | None:
    """What an export with adapters kept; None for another folder."""
    record = export_manifest(folder).get("adapter")
    return AdapterForm.read(record, folder) if isinstance(record, Mapping) else None
