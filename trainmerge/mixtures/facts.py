"""What the manifest of a mixture of dense experts says of it."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainmerge.checkpoints.whole import export_manifest
from trainmerge.mixtures.learn_routers import Learned
from trainmerge.mixtures.upcycle_plan import UpcyclePlan


def mixture_facts(folder: Path) -> dict[str, Any]:
    """What the manifest of a mixture says: family, experts, the routers' accuracies, divergences.

    Raises:
        ValueError: another folder.
    """
    facts = export_manifest(folder).get("mixture")
    if not isinstance(facts, dict):
        raise ValueError(f"{folder}: not a mixture that `trainmerge export --as moe` made")
    return facts


def facts_of(
    plan: UpcyclePlan, learned: Mapping[str, Learned], factor: float, losses: Mapping[str, float]
) -> dict[str, Any]:
    """What the manifest and the card say."""
    return {
        "family": plan.mixture.model_type,
        "experts": len(plan.exported.recipe.experts),
        "top_k": plan.top_k,
        **({"routed": plan.routed} if plan.mixture.shared else {}),
        "temperature": factor,
        "divergence": dict(losses),
        "accuracy": {layer: own.accuracy for layer, own in learned.items()},
    }


def warn_of_chance(facts: Mapping[str, Any]) -> None:
    """Warn if the routers do not know the experts' texts apart."""
    accuracies, chance = list(facts["accuracy"].values()), 1 / facts["experts"]
    if (mean := sum(accuracies) / len(accuracies)) < 1.2 * chance:
        warnings.warn(
            f"the routers send {mean:.0%} of the held-out tokens to their own expert first, and {chance:.0%} "
            "would be chance: the experts' texts look alike, or are too few",
            stacklevel=3,
        )
