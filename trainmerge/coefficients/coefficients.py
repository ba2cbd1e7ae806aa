"""The coefficients, which are all that is trained, and the coefficient of each parameter.

Legend: `K` experts, `G` coefficient groups, `C` chunks of one parameter.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from trainmerge.coefficients.constraints import Constraint, Free
from trainmerge.coefficients.layout import Layout
from trainmerge.kernels import accumulation_dtype
from trainmerge.system.json_file import parse_json
from trainmerge.system.ranges import check_option
from trainmerge.system.safetensors_file import MappedFile, write_safetensors


class Coefficients(nn.Module):
    """The K x G coefficients of a merge: the optimizer updates `raw`, and the constraint maps it."""

    raw: nn.Parameter  # [K, G] float32
    densities: tuple[float, ...] = ()  # K, that a search found with them: of a `Trim` after all else

    def __init__(
        self,
        experts: Sequence[str],
        layout: Layout,
        initial: Tensor | float = 0.3,  # [K, G], [K, 1], or one number for all
        constraint: Constraint | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.layout = tuple(experts), layout
        self.constraint = constraint or Free()
        # float32 independent of the default dtype (bf16-true changes it); float64 for gradient checks
        start = torch.as_tensor(initial, dtype=accumulation_dtype(torch.get_default_dtype()))
        start = start.expand(len(self.experts), len(layout.labels)).clone()
        self.raw = nn.Parameter(self.constraint.start(start))
        self._fixed = self.raw.detach()[:, list(layout.fixed)].clone()  # [K, fixed groups]

    def forward(self) -> Tensor:
        """The coefficients, [K, G], differentiable in `raw`, except for fixed ones."""
        raw: Tensor = self.raw
        if self.layout.fixed:  # whatever an optimizer did to them within its step
            raw = raw.index_copy(1, self._fixed_groups(), self._fixed.to(raw))
        return self.constraint.values(raw)

    def of(self, name: str, values: Tensor) -> Tensor:
        """One parameter's columns of `values` [K, G] -> [K, C]."""
        return values[:, list(self.layout.groups[name])]

    def slope(self, gradient: Tensor) -> Tensor:
        """d loss / d raw, given d loss / d coefficients, both [K, G]; 0 where coefficients are fixed."""
        # Not `backward`: DDP's hooks would reduce the already reduced gradient again.
        (found,) = torch.autograd.grad(self(), self.raw, gradient.to(self.raw))
        return found

    def backward(self, gradient: Tensor) -> None:
        """Add d loss / d raw to `raw.grad`, given d loss / d coefficients [K, G]."""
        found = self.slope(gradient)
        self.raw.grad = found if self.raw.grad is None else self.raw.grad + found

    @torch.no_grad()
    def reset_(self, values: Tensor) -> None:
        """Set the coefficients, [K, G], including fixed ones."""
        self.raw.copy_(self.constraint.start(values.to(self.raw)))
        self._fixed = self.raw.detach()[:, list(self.layout.fixed)].clone()

    @torch.no_grad()
    def project_(self) -> None:
        """Project `raw` onto the constraint's set; called after every optimizer step.

        Restores fixed coefficients, because weight decay changes them even without a gradient.
        """
        projected = self.constraint.project(self.raw)
        self.raw.copy_(projected.index_copy(1, self._fixed_groups(), self._fixed.to(self.raw)))

    def release_(self) -> None:
        """From now on no coefficient is fixed: all have gradients, and may be changed."""
        self.layout = replace(self.layout, fixed=())
        self._fixed = self._fixed[:, :0]

    def _fixed_groups(self) -> Tensor:
        return torch.tensor(self.layout.fixed, dtype=torch.int64, device=self.raw.device)


def save_coefficients(coefficients: Coefficients, path: Path) -> None:
    """Write the values [K, G] in float32, with experts and layout, as safetensors, atomically."""
    metadata = {"experts": json.dumps(coefficients.experts), "layout": coefficients.layout.to_json()}
    if coefficients.densities:
        metadata["densities"] = json.dumps(coefficients.densities)
    values = coefficients().detach().float().cpu()
    specs = {"coefficients": (values.dtype, tuple(values.shape))}
    write_safetensors(path, specs, [("coefficients", values)], metadata)


def load_coefficients(path: Path) -> Coefficients:
    """Read `save_coefficients`'s file, as unconstrained coefficients.

    Raises:
        ValueError: not such a file, or damaged.
    """
    file = MappedFile(path)
    if not {"experts", "layout"} <= file.metadata.keys() or "coefficients" not in file.tensors:
        raise ValueError(f"{path}: not a coefficients file of trainmerge (no layout in its header)")
    try:
        layout = Layout.from_json(file.metadata["layout"])
        experts = parse_json(file.metadata["experts"], "experts", "")
        if not isinstance(experts, list) or not all(isinstance(name, str) for name in experts):
            raise ValueError("experts: not a list of names")
        densities = parse_json(file.metadata.get("densities", "[]"), "densities", "")
        check_option("densities", densities, Sequence[float], "(0, 1]")
        if densities and len(densities) != len(experts):
            raise ValueError(f"densities: {len(densities)} for {len(experts)} experts")
    except ValueError as error:
        raise ValueError(f"{path}: its header is damaged ({error}). Restore the file from a copy.") from error
    values, shape = file.read("coefficients").clone(), (len(experts), len(layout.labels))
    groups = {group for chunks in layout.groups.values() for group in chunks} | {*layout.fixed}
    sound = values.dtype == torch.float32 and values.shape == shape and bool(values.isfinite().all())
    if not sound or not groups <= {*range(shape[1])}:
        raise ValueError(
            f"{path}: its values do not match its header, or are not finite: the file is damaged"
        )
    found = Coefficients(experts, layout, values)
    found.densities = tuple(densities)
    return found
