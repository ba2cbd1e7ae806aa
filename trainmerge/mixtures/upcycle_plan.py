"""A mixture to be made of a run's experts: everything but its routers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainmerge.checkpoints import check_tensors, translated_config
from trainmerge.export.explain import Exported
from trainmerge.export.export import begin_export, merge_of
from trainmerge.export.form import Form, write_dtype, write_settings
from trainmerge.export.shards import CheckpointMerge
from trainmerge.mixtures.families import Mixture, feed_forward, mixture_of
from trainmerge.mixtures.upcycled import Upcycled
from trainmerge.run.folder import RunFolder
from trainmerge.run.recipe_files import text_files
from trainmerge.system import distributed
from trainmerge.system.ranges import check_option


@dataclass(frozen=True)
class UpcyclePlan:
    """A mixture before its routers are known.

    Args:
        exported: The run and its merge.
        merge: The merge.
        mixture: The family of the result.
        settings: Its config.json.
        top_k: Experts for each token.
        routed: The share of the routed experts, of a family with a shared one.
    """

    exported: Exported
    merge: CheckpointMerge
    mixture: Mixture
    settings: Mapping[str, Any]
    top_k: int
    routed: float

    def tensors(self, routers: Mapping[str, Tensor]) -> Upcycled:
        """The mixture with these routers, by layer."""
        originals = self.exported.opened.task_vectors
        return Upcycled(self.merge, originals, self.mixture, routers, self.routed)

    @property
    def layers(self) -> list[str]:
        """The layers with a feed-forward network."""
        return list(dict.fromkeys(layer for layer, _ in feed_forward(self.merge.tensors).values()))

    def write_settings(self, folder: Path) -> None:
        """Write the mixture's config.json."""
        write_settings(folder, self.settings)
        if self.merge.form.dtype:
            write_dtype(folder / "config.json", self.merge.form.dtype)

    def check(self, folder: Path) -> None:
        """Raise ValueError if transformers' model of the settings has other parameters than will be written.

        Writes the settings into the folder.
        """
        self.write_settings(folder)
        size = len(self.exported.recipe.experts), self.settings["hidden_size"]
        empty = {layer: torch.empty(size, device="meta") for layer in self.layers}
        check_tensors(folder, self.tensors(empty).tensors)


def plan_upcycling(run: str | Path, out: str | Path, top_k: int, routed: float, form: Form) -> UpcyclePlan:
    """Open a run, and check all that can be checked before a weight is read.

    Raises:
        ValueError: as `export_mixture`.
    """
    check_option("top_k", top_k, int, "[1, inf)")
    check_option("routed", routed, float, "(0, 1]")
    if distributed.world_size() > 1:
        raise ValueError("a mixture is written by one process: run the command without torchrun")
    run_folder = RunFolder(Path(run))
    exported = replace(begin_export(run_folder, Path(out), None), form=form)
    recipe, base = exported.recipe, exported.opened.base
    count = len(recipe.experts)
    mixture = mixture_of(base.path, base.config)
    if count < 2 or top_k > count:
        raise ValueError(
            f"the run has {count} expert{'s' * (count > 1)}: a mixture needs two or more, and --top-k (now "
            f"{top_k}) is at most their number"
        )
    text_files(recipe)
    settings = translated_config(base.path, mixture.settings(count, top_k, base.config))
    merge = replace(merge_of(run_folder, recipe, exported.coefficients, exported.opened), form=form)
    return UpcyclePlan(exported, merge, mixture, settings, top_k, routed)
