"""Checks of a fit whose examples are pictures or sounds without text."""

from trainmerge.checkpoints import Output
from trainmerge.data.calibration import Calibration
from trainmerge.data.heads import Head, LabelHead, LinearHead
from trainmerge.data.media import without_text
from trainmerge.fitting.module import MergeModule

ALONE = "data.columns.text: null reads pictures or sounds alone"


def is_pooled(head: Head) -> bool:
    """Whether a head reads the model's own pooled vector."""
    return isinstance(head, LinearHead) and head.pooling == "pooled"


def media_problems(module: MergeModule, data: Calibration, output: Output) -> list[str]:
    """What base, heads and objective cannot do with pictures or sounds alone; empty for texts."""
    alone = {without_text(examples) for examples in data.examples}
    base, heads = module.recipe.base, [e.head for e in module.recipe.experts.values()]
    if alone == {False} and output.reads == "media":
        return [
            f"{base}: {output.architecture} reads pictures or sounds and no texts: set data.columns.text "
            "to null, and data.columns.image or audio to their column"
        ]
    if alone == {False}:
        if output.reads == "both":
            return [
                f"{base}: {output.architecture} reads pictures, and its texts are their labels: set "
                "data.columns.text to null, and data.columns.image"
            ]
        if output.needs and None in heads and not (data.columns.image or data.columns.audio):
            return [
                f"{base}: {output.architecture} reads no text without {', '.join(output.needs)}: name the "
                "column of its pictures or sounds (data.columns.image or audio)"
            ]
        return []
    problems = []
    if output.reads == "tokens":
        problems.append(
            f"{ALONE}, and {base} is a {output.architecture}, which reads texts: name their column"
        )
    if output.reads == "media" and any(isinstance(head, LabelHead) for head in heads):
        problems.append(
            f"{base}: {output.architecture} has no text tower, which a LabelHead needs: use the whole model "
            "(a CLIPModel or SiglipModel) as base and experts, or a LinearHead"
        )
    if data.columns.audio and any(heads):
        problems.append("data.columns.audio with a `head`: sounds need a model with a classifier of its own")
    if data.columns.audio and not data.columns.target and module.objective.asks.layers:
        problems.append(
            "model.objective.layers with data.columns.audio: sounds differ in length, so their hidden states "
            "cannot be compared as one vector; align the logits only (hidden: 0)"
        )
    return problems
