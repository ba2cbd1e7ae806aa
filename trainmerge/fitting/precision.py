"""Lightning's scaler of float16 gradients, replaced by the merged model's own scale."""

from collections.abc import Iterator
from contextlib import contextmanager

from pytorch_lightning.plugins.precision import MixedPrecision, Precision

from trainmerge.model.loss_scale import LossScale


def scale_of(plugin: Precision) -> LossScale | None:
    """The loss scale that a trainer's precision asks for; None leaves it to the model's dtypes."""
    scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
    return None if scaler is None else LossScale.like(scaler)


@contextmanager
def without_scaler(plugin: Precision) -> Iterator[None]:
    """In this context the plugin scales no loss and unscales no gradient.

    Its scaler would hand scaled gradients to everything before the optimizer, and calls no closure, which
    L-BFGS and `FrankWolfe` need.
    """
    scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
    if isinstance(plugin, MixedPrecision):
        plugin.scaler = None
    try:
        yield
    finally:
        if isinstance(plugin, MixedPrecision):
            plugin.scaler = scaler
