"""What a merge will lose, from one pass of each expert and before any fit.

Legend: `K` experts, `G` coefficient groups.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from trainmerge.coefficients.layer_systems import System, expert_moments, layer_systems
from trainmerge.coefficients.layout import Layout
from trainmerge.coefficients.measured_presets import Measures

RIDGE = 1e-6


@dataclass(frozen=True)
class Forecast:
    """The experts' effects on the outputs of linear layers, and the share that no coefficients reach.

    A layer's share at coefficients c is

        sum_k w_k |(sum_j c_j tau_j - tau_k) X_k|^2 / sum_k w_k |tau_k X_k|^2

    0 is no loss, 1 is that of the base. Layers count by their size, the root of the denominator.

    Args:
        layers: Layer -> its quadratic, relative to its total.
        sizes: Layer -> its size.
    """

    layers: Mapping[str, System]
    sizes: Mapping[str, float]

    def best(self) -> Tensor:
        """One coefficient per expert for all layers, [K], with the least loss."""
        whole = System.zero(len(next(iter(self.layers.values())).effects))
        for name, own in self.layers.items():
            whole.products += self.sizes[name] * own.products
            whole.effects += self.sizes[name] * own.effects
        return whole.solve(RIDGE)

    def together(self, names: Iterable[str]) -> float:
        """The share out of reach in these layers with one coefficient per expert for all layers."""
        return self._share(dict.fromkeys(names, self.best()))

    def apart(self, names: Iterable[str]) -> float:
        """The share out of reach in these layers with one coefficient per expert and layer."""
        return self._share({name: self.layers[name].solve(RIDGE) for name in names})

    def _share(self, coefficients: Mapping[str, Tensor]) -> float:
        """The mean share at each layer's coefficients [K], by size."""
        left = sum(self.sizes[name] * self.layers[name].residual(c) for name, c in coefficients.items())
        return left / sum(self.sizes[name] for name in coefficients)


def forecast(layout: Layout, measure: Measures, experts: int) -> Forecast:
    """Measure every merged linear layer that the experts' examples reach.

    Raises:
        ValueError: there is none.
    """
    layers: dict[str, System] = {}
    sizes: dict[str, float] = {}
    for name, moments in expert_moments(layout, measure, experts):
        for _, system in layer_systems(name, (0,), moments, measure):
            if system.total > 0:
                layers[name] = System.zero(experts)
                layers[name].add(system)
                sizes[name] = system.total**0.5
    if not layers:
        raise ValueError("forecast: the examples reach no linear layer whose weight is merged")
    return Forecast(layers, sizes)
