"""The sizes of the experts' recorded outputs, before they are recorded."""

from typing import Any, NamedTuple

from torch import nn

from trainmerge.checkpoints import output_of
from trainmerge.data.batch import Step
from trainmerge.data.calibration import Calibration
from trainmerge.fitting.module import MergeModule
from trainmerge.model.media_forward import is_media_alone, state_numbers
from trainmerge.run.heads import task_heads


class Records(NamedTuple):
    """The size of the experts' recorded outputs."""

    width: int = 0  # probabilities per row; 0 for all
    memory: int = 0  # bytes, of the largest expert while it is recorded
    files: int = 0


def recorded_sizes(module: MergeModule, data: Calibration, step: Step, meta_model: nn.Module) -> Records:
    """The sizes that `teachers` will choose, at the length of the longest example."""
    asks = module.objective.asks
    if asks.temperature is None and not asks.layers:  # sentence embeddings are negligible
        return Records()
    if is_media_alone(step[0].inputs) and "labels" not in step[0].inputs:
        one = asks.dtype.itemsize * state_numbers(meta_model, step[0].inputs, asks.layers)
        each = [one * len(own) for own in data.examples]  # a few classes: negligible
        return Records(0, max(each), sum(each))
    config: Any = meta_model.config
    config = getattr(config, "text_config", None) or config
    for name in ("hidden_size", "vocab_size"):
        if not isinstance(getattr(config, name, None), int):
            raise ValueError(f"the size of the recorded outputs is unknown: config.json names no {name}")
    positions = [len(own) * batch.mask.shape[1] for own, batch in zip(data.examples, step, strict=True)]
    hidden = [asks.dtype.itemsize * config.hidden_size * len(asks.layers) * count for count in positions]
    own_classes = output_of(module.opened.base.path).classes
    heads = task_heads(module.recipe, module.opened)
    by_class = [own_classes or head is not None for head in heads.values()]
    rows = [
        len(own) if classes else count
        for own, classes, count in zip(data.examples, by_class, positions, strict=True)
    ]
    width, probabilities = 0, [4 * config.vocab_size * count for count in rows]
    if asks.temperature is None or all(by_class):
        probabilities = [0] * len(rows)  # a few classes: negligible
    elif sum(probabilities) > module.settings.teacher_budget:
        width = max(1, module.settings.teacher_budget // (8 * sum(rows)))
        probabilities = [8 * width * count for count in rows]
    each = [a + b for a, b in zip(hidden, probabilities, strict=True)]
    return Records(width, max(each), sum(each))
