"""Initial coefficients: numbers, a preset, or the coefficients of an earlier run.

Legend: `K` experts, `G` coefficient groups, `C` chunks of one parameter.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainmerge.coefficients.coefficients import Coefficients, load_coefficients
from trainmerge.coefficients.layout import Layout
from trainmerge.coefficients.presets import Preset
from trainmerge.system.ranges import check_option

Initial = float | Sequence[float] | str | Preset


def read_initial(initial: Initial, experts: Sequence[str], layout: Layout) -> Tensor:
    """Initial coefficients [K, 1] or [K, G]: one number, one per expert, a coefficients file, or a preset.

    A file may have a coarser grouping: every chunk then starts with its parameter's coefficient.

    Raises:
        ValueError: numbers that are not finite, the wrong number of experts, or a file of a different merge.
    """
    check_option("initial", initial, float | Sequence[float] | str | Preset)
    if isinstance(initial, Preset):
        return initial(experts, layout)
    if isinstance(initial, str):
        saved = load_coefficients(Path(initial))
        if saved.experts != tuple(experts):
            raise ValueError(f"{initial}: from a merge of other experts ({saved.experts})")
        try:
            return carried(saved, layout)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{initial}: its grouping does not match: {error}") from error
    values = torch.as_tensor(initial, dtype=torch.float32).reshape(-1, 1)
    if len(values) not in (1, len(experts)):
        raise ValueError(
            f"initial has {len(values)} values for {len(experts)} experts; give one, or one each"
        )
    return values.expand(len(experts), 1)


def carried(saved: Coefficients, layout: Layout) -> Tensor:
    """The saved coefficients under another layout of the same parameters, [K, G].

    Raises:
        KeyError: a parameter that was not merged.
        ValueError: chunks do not match, or parameters with different coefficients are to share one.
    """
    values = saved.forward().detach()
    if unknown := layout.groups.keys() - saved.layout.groups.keys():
        raise KeyError(f"it has no coefficients for {sorted(unknown)[:3]}")
    carried = torch.full((len(values), len(layout.labels)), torch.nan)
    for name, groups in layout.groups.items():
        own = saved.of(name, values)  # [K, C before]
        if own.shape[1] not in (1, len(groups)):
            raise ValueError(f"{name} has {own.shape[1]} chunks in the file and {len(groups)} here")
        there = carried[:, list(groups)]
        own = own.expand(-1, len(groups))
        if not torch.equal(torch.where(there.isnan(), own, there), own):
            raise ValueError(
                f"{name} is to share a coefficient with parameters whose coefficient differs in the file"
            )
        carried[:, list(groups)] = own
    return carried
