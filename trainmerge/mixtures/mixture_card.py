"""The part of a model card that only a mixture has."""

from collections.abc import Mapping
from typing import Any


def mixture_words(facts: Mapping[str, Any]) -> str:
    """Markdown: what the mixture is made of, and how its routers were learned."""
    accuracies = list(facts["accuracy"].values())
    shared = (
        f" The merge's network is the shared expert; the routed ones weigh {facts['routed']:g}."
        if "routed" in facts
        else ""
    )
    loss = facts["divergence"]
    return (
        f"## Mixture\n\nThe feed-forward networks of the {facts['experts']} experts are those of a "
        f"{facts['family']} model, {facts['top_k']} for each token; all other tensors are the merge below."
        f"{shared} Each layer's router is a logistic regression on its inputs that tells the experts' "
        f"calibration texts apart: {sum(accuracies) / len(accuracies):.0%} of held-out tokens go to their "
        f"own expert first. On held-out texts the mixture is {loss['mixture']:.4f} nats per token from the "
        f"experts, the merge alone {loss['merge']:.4f}."
    )
