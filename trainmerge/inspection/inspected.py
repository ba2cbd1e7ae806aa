"""All that `trainmerge inspect` finds out about a recipe."""

from dataclasses import asdict
from typing import Any, NamedTuple

from trainmerge.inspection.console import parameter_counts
from trainmerge.inspection.findings import Finding, Texts
from trainmerge.inspection.suggest import Suggestion
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.task_vectors.geometry import Geometry


class Inspected(NamedTuple):
    """All that is known of a recipe."""

    opened: Opened
    texts: Texts
    findings: list[Finding]
    geometry: Geometry | None
    suggested: Suggestion | None

    def as_json(self, recipe: Recipe) -> dict[str, Any]:
        """The same as `--output` writes it."""
        opened, geometry, suggested = self.opened, self.geometry, self.suggested
        experts = list(opened.task_vectors.experts)
        content: dict[str, Any] = {
            "base": recipe.base,
            "experts": {name: expert.path for name, expert in recipe.experts.items()},
            "examples": self.texts.counts,
            **parameter_counts(opened),
            "findings": [asdict(finding) for finding in self.findings],
        }
        if suggested is not None:
            content["suggestion"] = {"settings": suggested.settings, "reasons": suggested.reasons}
        if geometry is not None:
            whole = geometry.of(geometry.names)
            content["geometry"] = {
                "experts": experts,
                "relative_norms": whole.relative_norms()[0].tolist(),
                "cosines": whole.cosines()[0].tolist(),
                "opposed": whole.conflicts()[0].tolist(),
            }
        return content
