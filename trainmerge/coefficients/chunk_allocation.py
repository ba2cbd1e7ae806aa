"""Importance of parameters, and the allocation of chunks to them (Expert Merging++).

Legend: `K` experts, `L` parameters, `C` chunks of one parameter.
"""

from collections.abc import Mapping

import torch
from rich.progress import track

from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.system.ranges import check_option
from trainmerge.task_vectors.delta import TaskVectors, dense_term


@torch.no_grad()
def magnitude(task_vectors: TaskVectors, coefficients: Coefficients) -> dict[str, float]:
    """I_l = sum_k |c_kl| * mean|tau_kl| * n_l, normalised to sum to one over the merged parameters.

    Expert Merging++ (arXiv 2509.25712). mean|tau| * n is the 1-norm, so importance measures how much the
    merge changes a parameter. If a parameter has several coefficients, their mean |c| is used. Reads every
    task vector once, one at a time.

    Raises:
        ValueError: the merge changes nothing.
    """
    values = coefficients().abs()
    scores = {}
    for name in track(list(coefficients.layout.groups), description="measuring task vectors"):
        delta = task_vectors.deltas[name]
        weights = coefficients.of(name, values).mean(dim=1).tolist()
        scores[name] = sum(
            weight * dense_term(term, delta.base).abs().sum(dtype=torch.float64).item()
            for weight, term in zip(weights, delta.terms, strict=True)
        )
    return shares(scores)


def shares(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores that sum to one.

    Raises:
        ValueError: they are all zero.
    """
    total = sum(scores.values())
    if not total > 0:
        raise ValueError("the importance of every parameter is 0, so no budget can be allocated")
    return {name: score / total for name, score in scores.items()}


def allocate_chunks(
    importance: Mapping[str, float], rows: Mapping[str, int], budget: float, kappa: float = 1.0
) -> dict[str, int]:
    """Chunks per parameter: budget * L of them, shared in proportion to importance^kappa.

    Rounded by largest remainder, so that they sum to the budget (the paper's floor drops a quarter to a half
    of it). No parameter gets more chunks than it has rows; the excess goes to the others. kappa 0 is uniform.
    A parameter with 0 chunks keeps its coefficient.

    Raises:
        ValueError: a budget that is not positive, a negative kappa, or more chunks than rows in total.
    """
    check_option("budget", budget, float, "(0, inf)")
    check_option("kappa", kappa, float, "[0, inf)")
    total = round(budget * len(importance))
    if total > sum(rows[name] for name in importance):
        raise ValueError(f"{total} chunks are more than the parameters' rows; use a smaller budget")
    weights = {name: float(score > 0 or kappa == 0) * score**kappa for name, score in importance.items()}
    chunks = dict.fromkeys(importance, 0)
    while left := total - sum(chunks.values()):
        chunks = _shared(chunks, left, weights, rows)
    return chunks


def _shared(
    chunks: dict[str, int], left: int, weights: Mapping[str, float], rows: Mapping[str, int]
) -> dict[str, int]:
    """Distribute `left` more chunks by largest remainder among the parameters that have rows left."""
    open_ = [name for name, count in chunks.items() if count < rows[name]]
    total = sum(weights[name] for name in open_)
    # If no weight is left, the rest is distributed evenly.
    shares = {name: left * (weights[name] / total if total else 1 / len(open_)) for name in open_}
    whole = {name: int(share) for name, share in shares.items()}
    by_remainder = sorted(open_, key=lambda name: whole[name] - shares[name])  # stable: ties keep their order
    for name in by_remainder[: left - sum(whole.values())]:
        whole[name] += 1
    return {name: min(rows[name], count + whole.get(name, 0)) for name, count in chunks.items()}
