"""Changes of an expert that no merge contains, so that its one-hot merge is not the expert: each is named.

Statistics of batch normalisation are buffers, which are never merged, and without a rule for them they are
the base's. Tensors that `ignore` names keep the base's values.
"""

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor

from trainmerge.checkpoints.adapter import Adapter
from trainmerge.checkpoints.full_expert import FullExpert
from trainmerge.checkpoints.low_rank_adapter import LowRankAdapter
from trainmerge.checkpoints.merged_adapter import MergedAdapter
from trainmerge.checkpoints.meta_model import shorten
from trainmerge.checkpoints.own_buffers import changed_buffers, differ
from trainmerge.checkpoints.parameters import Parameters
from trainmerge.checkpoints.prediction_layers import extra_layers
from trainmerge.system.text import listed

# A factor whose partner may be zero, and a copy of the base's embedding
UNCHANGING = (".lora_A.weight", ".lora_embedding_A", ".base_layer.weight")
IGNORED = (
    "changed {names}, which `ignore` leaves at the base's values: neither the merge nor this expert's "
    "recorded outputs contain that change, so its teacher is not the expert. Narrow `ignore` to tensors that "
    "the base lacks"
)
STATISTICS = (
    "has statistics of its own, {names}, and the merge keeps the base's. `recipe.buffers: average` averages "
    "those of the experts, `reestimate` estimates them again on the calibration data, and `keep` is this, "
    "without a warning"
)
BIAS = "e_score_correction_bias"
BALANCE = (
    "has router biases of its own, {names}: they balance the load of training and are buffers, so the merge "
    "and the recorded outputs use the base's"
)
EXTRA = (
    "{path}: transformers does not run {count} tensors of its files, {names}: layers of multi-token "
    "prediction. They are not merged, and stay the base's, which the merge's own predictions fit less"
)
Plan = FullExpert | LowRankAdapter | MergedAdapter


def warn_of_hidden_changes(frame: Parameters, plans: Mapping[str, Plan], statistics: bool = True) -> None:
    """One warning per expert and kind of change, and one of the base; reads buffers and ignored tensors.

    Without `statistics`, a rule was chosen for those of batch norms.
    """
    if extra := extra_layers(frame.meta_model, frame.checkpoint.tensors):
        where = {"path": frame.checkpoint.path, "count": len(extra), "names": listed(extra, 2)}
        warnings.warn(EXTRA.format(**where), stacklevel=4)
    for expert, plan in plans.items():
        if isinstance(plan, FullExpert):
            _warn(expert, _ignored(frame, plan.parameters), IGNORED)
            changed = [name for name, _ in changed_buffers(frame, plan)]
            biases = [name for name in changed if name.endswith(BIAS)]
            if statistics:
                _warn(expert, [name for name in changed if name not in biases], STATISTICS)
            _warn(expert, biases, BALANCE)
        else:
            _warn(expert, _ignored_by_adapter(frame, plan.adapter), IGNORED)


def _warn(expert: str, names: Sequence[str], words: str) -> None:
    if names:
        warnings.warn(f"expert {expert} {words.format(names=shorten(names))}", stacklevel=4)


def _ignored(frame: Parameters, own: Parameters) -> list[str]:
    """The base's ignored parameters that a full expert changed."""
    theirs = _by_parameter(own)
    found = []
    for parameter, name in _by_parameter(frame).items():
        if parameter not in frame.files and parameter in theirs:
            ours, other = frame.checkpoint.read(name), own.checkpoint.read(theirs[parameter])
            found += [name] if differ(ours, other) else []
    return found


def _ignored_by_adapter(frame: Parameters, adapter: Adapter) -> list[str]:
    """The ignored parameters of the base that an adapter changes."""
    hidden = set(frame.names.values()) - frame.files.keys()
    found: dict[str, None] = {}  # an ordered set
    for key, name in {**adapter.keys, **adapter.ignored}.items():
        parameter = key if key in hidden else f"{adapter.module_of(key)}.weight"
        known = parameter in hidden and not key.endswith(UNCHANGING)
        if known and _changes(frame, key, adapter.source.read(name)):
            found[parameter] = None
    return list(found)


def _changes(frame: Parameters, key: str, tensor: Tensor) -> bool:
    """Whether a factor is not zero, or a whole tensor is not the base's."""
    name = _by_parameter(frame).get(key)
    return bool(tensor.any()) if name is None else differ(frame.checkpoint.read(name), tensor)


def _by_parameter(parameters: Parameters) -> dict[str, str]:
    """Every parameter, ignored ones too -> one of its tensors in the files."""
    return {parameter: name for name, parameter in parameters.names.items()}
