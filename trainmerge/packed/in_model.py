"""Where the tensors of packed experts are in a model in memory: its own, or parts of them in a mixture."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from trainmerge.checkpoints import Checkpoint
from trainmerge.task_vectors.places import parameter_of, view


def tensors_in(model: nn.Module, base: Checkpoint, names: Iterable[str]) -> dict[str, Tensor]:
    """The memory of these tensors of a checkpoint's files; those that the model does not have are left out.

    With or without the prefix of its base model. Where the files have a matrix per expert and transformers
    one parameter per layer, it is a view of the expert's part.
    """
    there = dict(model.state_dict(keep_vars=True))
    prefix = str(getattr(model, "base_model_prefix", ""))
    found = {name: _plain(name, prefix, there) for name in names}
    lost = [name for name, place in found.items() if not place]
    found |= _placed(model, base, lost)
    return {name: view(place, there[parameter_of(place)].data) for name, place in found.items() if place}


def _plain(name: str, prefix: str, there: Mapping[str, Tensor]) -> str:
    """The model's name of a tensor, with or without the prefix; empty if it has none."""
    found = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((one for one in found if one in there), "")


def _placed(model: nn.Module, base: Checkpoint, names: Iterable[str]) -> dict[str, str]:
    """The same after transformers' conversions on loading, of a model of the base's class."""
    wanted = [name for name in names if name in base.tensors]
    if not wanted or not hasattr(model, "base_model_prefix"):  # no model of transformers
        return {}
    from trainmerge.checkpoints import locate  # imports transformers

    own: Any = model
    try:
        places = locate(own, base.path, base.tensors)
    except ValueError:  # another model: the caller says what it lacks
        return {}
    return {name: places[name] for name in wanted if name in places}
