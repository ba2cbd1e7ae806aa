"""Checks of a fit before it creates its folder or reads a weight."""

from collections.abc import Iterator

from trainmerge.checkpoints import Output, OwnHead, output_of
from trainmerge.checkpoints.output import ENDS
from trainmerge.data.calibration import Calibration
from trainmerge.data.examples import Example
from trainmerge.data.heads import Head
from trainmerge.data.media import without_text
from trainmerge.data.token_checks import check_embedding_rows
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.fitting.embedding_check import embedding_problems
from trainmerge.fitting.media_preflight import is_pooled, media_problems
from trainmerge.fitting.module import MergeModule
from trainmerge.fitting.on_policy import check_on_policy
from trainmerge.objectives import Alignment, Objective
from trainmerge.run.heads import task_heads, unusable_heads

TOGETHER = 64  # examples that are tokenised at a time


def check_tasks(module: MergeModule, data: Calibration) -> None:
    """Raise ValueError for experts whose loss is undefined; lists every reason, by expert and file."""
    output = output_of(module.opened.base.path)
    problems = [
        *head_problems(module, output),
        *layer_problems(module.objective, output),
        *embedding_problems(module, data),
        *(media_problems(module, data, output) or example_problems(data)),
    ]
    if problems:
        raise ValueError("\n".join(problems))


def check_rounds(module: MergeModule, data: Calibration) -> None:
    """Raise ValueError for a fit that cannot learn from texts of its own, if it should."""
    if module.on_policy is None:
        return
    if module.settings.sharded or module.keep_better:
        raise ValueError(
            "model.on_policy excludes model.sharded, whose processes have no whole model to write with, and "
            "model.keep_better, which compares losses on the examples: leave one of them out"
        )
    check_on_policy(module.on_policy, module.recipe, module.opened, module.objective, data)


def check_heads(module: MergeModule) -> None:
    """Raise ValueError for heads that are another function than their file's classifier."""
    if problems := list(unusable_heads(module.recipe)):
        raise ValueError("\n".join(problems))


def head_problems(module: MergeModule, output: Output) -> list[str]:
    """Experts that lack a head, or whose head is from another model."""
    heads, base = task_heads(module.recipe, module.opened), module.recipe.base
    headless = [name for name, head in heads.items() if head is None]
    given = {name: head for name, head in heads.items() if isinstance(head, Head)}
    for head in given.values():
        head.identity()  # reads its files, and raises if they are damaged
    problems = [
        f"recipe.experts.{name}.head has hidden size {width}, {base} has {size}: use the head that "
        "was trained with this expert"
        for name, head in given.items()
        if (size := output.embedding if is_pooled(head) else output.hidden)
        and (width := head.width()) not in (None, size)
    ]
    for name, own in heads.items():
        if isinstance(own, OwnHead):
            problems += [f"{name}: {line}" for line in own_head_problems(own, module.objective)]
    if not module.objective.needs_logits and not output.choices:
        return problems
    if headless and not output.logits:
        problems.append(
            f"{base} has no output layer, and {headless} no `head`: give each a LabelHead or a LinearHead, "
            "or use experts, or a base and experts, that were saved with an output layer"
        )
    elif headless and output.ends:
        problems.append(f"{base}: {output.architecture} {ENDS}")
    elif headless and output.uncompared:
        without = output.choices or (output.reads == "media" and output.architecture.endswith("ForCTC"))
        states = "" if without else "align hidden states only (Alignment: logits 0, hidden 1), "
        problems.append(
            f"{base}: {output.architecture} {output.uncompared}. Give {headless} a `head`, {states}or merge "
            "without learning (trainer.max_steps 0)"
        )
    elif headless and module.objective.needs_classes and not output.classes:
        problems.append(f"{module.objective!r} needs classes, and {headless} have no `head`: give each one")
    return problems


def own_head_problems(head: OwnHead, objective: Objective) -> Iterator[str]:
    """Why an expert's own head has no such loss."""
    try:
        _ = head.padding
    except ValueError as error:
        yield str(error)
    kind = head.outputs
    if kind == "values" and objective.needs_predictions:
        yield (
            f"{head.kind.__name__} is a regression ({head.config_file}), whose numbers are no "
            f"probabilities, as {type(objective).__name__} needs them: use Alignment"
        )
    elif kind != "classes" and objective.needs_classes:
        yield f"{objective!r} needs one class per text, and {head.kind.__name__} gives none: leave it out"


def layer_problems(objective: Objective, output: Output) -> list[str]:
    """Layers of the objective that the model does not have; 0 is the embedding, so L layers have L + 1."""
    layers = objective.layers if isinstance(objective, Alignment) else objective.asks.layers
    if (depth := output.layers) is None:
        return []
    return [
        f"model.objective.layers: no layer {layer}; the model has {depth}, so choose from 0 (the embedding) "
        f"to {depth}, or from -1 (the last) to {-depth - 1}"
        for layer in layers
        if not -depth - 1 <= layer <= depth
    ]


def example_problems(data: Calibration) -> list[str]:
    """Files with examples without an unmasked token, or with a token beyond the model's embedding.

    The loss of the former would be NaN, or that of special tokens alone.
    """
    found = []
    for file, examples in zip(data.files.values(), data.examples, strict=True):
        try:
            check_embedding_rows(data.tokenize, examples)
        except ValueError as error:
            found.append(f"{file}: {error}")
            continue
        if unreadable := data.tokenize.media.problems(examples) if without_text(examples) else []:
            found.append(
                f"{file}: {len(unreadable)} of {len(examples)} cannot be read, the first: {unreadable[0]}"
            )
        elif silent := examples_without_tokens(examples, data.tokenize):
            found.append(
                f"{file}: {len(silent)} of {len(examples)} examples are blank or have no unmasked token, the "
                f"first is number {silent[0]}: remove them, or raise data.max_length ({data.max_length})"
            )
    return found


def examples_without_tokens(examples: list[Example], tokenizer: Tokenizer) -> list[int]:
    """Indices of blank examples, also where special tokens are added, and of those without an unmasked token.

    Only spans can cause the latter; blank texts with a picture or a sound are not blank.
    """
    silent = [i for i, e in enumerate(examples) if not (e.text.strip() or e.image or e.audio)]
    suspects = [i for i, e in enumerate(examples) if e.spans is not None and e.text.strip()]
    for first in range(0, len(suspects), TOGETHER):
        some = suspects[first : first + TOGETHER]
        mask = tokenizer.encode([examples[i] for i in some]).mask
        silent += [i for i, counted in zip(some, mask.sum(dim=1).tolist(), strict=True) if not counted]
    return sorted(silent)
