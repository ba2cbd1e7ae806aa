"""What the base is decides how its tasks are scored.

Classes, of a head or of the base's own classifier, give accuracy. A causal language model has a perplexity of
its texts, a sequence-to-sequence model one of its targets. The rest has no measure here.

Legend: `B` examples, `T` tokens.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from trainmerge.checkpoints import Output, OwnHead, output_of, read_modules
from trainmerge.checkpoints.output import ENDS
from trainmerge.data.batch import Kind
from trainmerge.data.encoded import Encoded
from trainmerge.run.heads import TaskHead, all_heads
from trainmerge.run.recipe import Recipe
from trainmerge.run.scores import ACCURACY, PERPLEXITY, SIMILARITY, Metric

HEADS = "give every task a `head`, which scores accuracy"
UNMEASURED = {
    "masked language model": "it predicts masked tokens, not the next one, so its texts have no perplexity; "
    f"{HEADS}",
    "bidirectional language model": "its attention sees the next token, so its texts have no perplexity; set "
    f"is_decoder in its config.json if it was trained as a decoder, or {HEADS}",
    "token classifier": f"labels of single tokens have no measure here; {HEADS}",
    "question-answering model": f"answer spans have no measure here; {HEADS}",
    "model without an output layer": f"{HEADS}; or, if it embeds sentences, write the modules.json of "
    "sentence-transformers into its folder",
    "model with another output": "it has no measure here; score its export with the library that trained it",
}


NAMES: Mapping[Kind, Metric] = {
    "classes": ACCURACY, "tokens": ACCURACY, "labels": Metric("f1"), "spans": Metric("exact_match"),
    "values": Metric("pearson"),
}  # fmt: skip


def kind_of_head(head: TaskHead) -> Kind:
    """What the outputs under a head are."""
    return head.outputs if isinstance(head, OwnHead) else "classes"


def metric_of(recipe: Recipe, found: Mapping[str, TaskHead] | None = None) -> Metric:
    """The metric of the tasks: that of their heads, accuracy of an own classifier, else perplexity.

    `found` are the heads of all tasks, by default those of `all_heads`. If they have several
    metrics, it is `score`.

    Without heads, a base with modules.json is a sentence embedder.

    Raises:
        ValueError: only some tasks have a head; the base has no measure.
    """
    tasks = [*(all_heads(recipe) if found is None else found).values()]
    heads = {head is not None for head in tasks}
    if heads == {True}:
        metrics = {NAMES[kind_of_head(head)] for head in tasks}
        return metrics.pop() if len(metrics) == 1 else Metric("score")
    if heads == {False} and read_modules(recipe.folders["base"]):
        return SIMILARITY
    output = output_of(recipe.folders["base"])
    if output.kind != "classifier" and len(heads) > 1:
        raise ValueError("only some tasks have a head: score the two kinds in separate recipes")
    return own_metric(output, recipe.base)


def own_metric(output: Output, where: str) -> Metric:
    """The metric of a model without heads; `where` is its folder.

    Raises:
        ValueError: it has none.
    """
    named = f"{where}: {output.architecture} is a {output.kind}"
    if output.ends:
        raise ValueError(f"{where}: {output.architecture} {ENDS}")
    if output.kind in UNMEASURED:
        raise ValueError(f"{named}: {UNMEASURED[output.kind]}")
    if output.kind != "classifier":
        return PERPLEXITY
    if (
        output.labels is None
        or output.labels < 2
        or output.problem not in (None, "single_label_classification")
    ):
        raise ValueError(
            f"{named} with {output.labels} labels and the problem_type {output.problem!r}: accuracy needs "
            "two or more classes of which one is right; score its export with the library that trained it"
        )
    return ACCURACY


def predicted(encoded: Encoded) -> Tensor:
    """Which tokens count in the perplexity, [B, T - 1] of a text's second to last, [B, T] of a target's."""
    if "labels" in encoded.inputs:
        return encoded.mask
    return encoded.mask[:, :-1] & encoded.inputs["attention_mask"][:, 1:].bool()


@torch.no_grad()
def check_causal(module: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Compare the logits of a text [1, T] with those after its last token is replaced by another of it.

    Raises:
        ValueError: those of an earlier position change, so the model sees the tokens that it is to predict.
    """
    tokens = inputs["input_ids"]
    others = tokens[tokens != tokens[0, -1]]
    if not len(others):
        return
    changed = torch.cat([tokens[:, :-1], others[None, -1:]], dim=1)
    before, after = (module(**{**inputs, "input_ids": ids}).logits[:, :-1] for ids in (tokens, changed))
    eps = torch.finfo(before.dtype).eps
    if (before - after).abs().max() > max(1e-4, 4 * eps) * before.abs().max():
        raise ValueError(
            f"{type(module).__name__} sees the tokens after the one that it predicts, so its texts have no "
            f"perplexity; {HEADS}"
        )
