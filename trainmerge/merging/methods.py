"""The methods that mergekit's files name: their settings with defaults, and how many models they take."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from trainmerge.merging import arithmetic, pairs, spherical
from trainmerge.merging.group import Group, Rule

REQUIRED = None  # a setting without a default
TRUTH = frozenset(
    (
        "normalize",
        "rescale",
        "int8_mask",
        "nuslerp_flatten",
        "nuslerp_row_wise",
        "normalize_weights",
        "filter_wise",
    )
)
STACKING = ("passthrough",)  # methods of layer stacking


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        rule: Group, faithful -> the rule of its pieces.
        base: Whether the file needs `base_model`, may have it, or merges it like any other model.
        least: The least number of models, without a base model that is not merged.
        most: The most.
        shared: Setting of all models -> default.
        each: Setting of each model -> default.
        with_base: Whether the base model is the first of the merged models (SLERP).
    """

    rule: Callable[[Group, bool], Rule]
    base: Literal["required", "optional", "merged"]
    least: int = 1
    most: int | None = None
    shared: Mapping[str, object] = field(default_factory=dict)
    each: Mapping[str, object] = field(default_factory=dict)
    with_base: bool = False


def _arithmetic(
    combine: Callable[..., Rule],
    choice: arithmetic.Choice,
    normalize: bool = False,
    rescale: bool = False,
    **each: float,
) -> Method:
    """base + lambda sum_k w_k tau_k of sparse task vectors."""
    shared = {"normalize": normalize, "rescale": rescale, "lambda": 1.0, "int8_mask": False}
    settings = {"weight": REQUIRED, "density": 1.0, **each}
    return Method(partial(combine, choice=choice), "required", shared=shared, each=settings)


METHODS: Mapping[str, Method] = {
    "linear": Method(
        arithmetic.linear_merge, "merged", shared={"normalize": True}, each={"weight": REQUIRED}
    ),
    "slerp": Method(spherical.slerp, "required", 2, 2, {"t": REQUIRED}, with_base=True),
    "nuslerp": Method(
        spherical.nuslerp, "optional", 2, 2,
        {"nuslerp_flatten": True, "nuslerp_row_wise": False}, {"weight": REQUIRED},
    ),
    "multislerp": Method(
        spherical.multislerp, "optional",
        shared={"normalize_weights": True, "eps": 1e-8}, each={"weight": REQUIRED},
    ),
    "karcher": Method(spherical.karcher, "merged", shared={"max_iter": 10, "tol": 1e-5}),
    "task_arithmetic": _arithmetic(arithmetic.summed, arithmetic.all_entries),
    "ties": _arithmetic(arithmetic.elected, arithmetic.largest_entries, normalize=True),
    "dare_linear": _arithmetic(arithmetic.summed, arithmetic.random, rescale=True),
    "dare_ties": _arithmetic(arithmetic.elected, arithmetic.random, rescale=True),
    "breadcrumbs": _arithmetic(arithmetic.summed, arithmetic.middle, gamma=0.01),
    "breadcrumbs_ties": _arithmetic(arithmetic.elected, arithmetic.middle, gamma=0.01),
    "della": _arithmetic(arithmetic.elected, arithmetic.ranked, True, True, epsilon=0.15),
    "della_linear": _arithmetic(arithmetic.summed, arithmetic.ranked, rescale=True, epsilon=0.15),
    "sce": Method(pairs.sce, "required", shared={"select_topk": 1.0, "int8_mask": False}),
    "model_stock": Method(spherical.model_stock, "required", 2, shared={"filter_wise": False}),
    "arcee_fusion": Method(pairs.arcee_fusion, "required", 1, 1),
    "nearswap": Method(pairs.nearswap, "required", 1, 1, {"t": REQUIRED}),
    "ram": Method(pairs.ram, "required", shared={"epsilon": 1e-5}),
    "ramplus_tl": Method(pairs.ramplus_tl, "required", shared={"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}),
}  # fmt: skip
KNOWN = sorted({key for method in METHODS.values() for key in (*method.shared, *method.each)} | {"scale"})


def setting_type(key: str) -> type:
    """The type of a setting: bool or float."""
    return bool if key in TRUTH else float
