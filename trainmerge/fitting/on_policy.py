"""Learning from what the merge itself writes: the settings, and what a fit must be to use them."""

from collections.abc import Iterator
from dataclasses import dataclass

from trainmerge.checkpoints import output_of
from trainmerge.data.calibration import Calibration
from trainmerge.data.examples import Example
from trainmerge.data.generate import WRITERS
from trainmerge.objectives import Objective
from trainmerge.run.heads import task_heads
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.system.ranges import check_fields


@dataclass(frozen=True)
class OnPolicy:
    """The merge continues every calibration example, and that example's expert judges what it wrote.

    A round begins every `every` steps: the merge, at the coefficients of that step, writes a continuation of
    each prompt, each expert is materialised once and its predictions on its prompts' continuations are
    recorded; the steps of the round learn from them by the fit's objective, on the written tokens only. No
    gradient passes through the sampling. Every prompt and round has its own seed.

    On-policy distillation (Agarwal et al., ICLR 2024, arXiv 2306.13649) from several teachers, whose only
    parameters are the coefficients.

    Args:
        every: Steps per round.
        prompt: The first tokens of an example that are its prompt; of one with spans or of a chat, everything
            before its first counted token is.
        length: Most tokens that the merge writes.
        temperature: Of the softmax that is sampled from.
    """

    every: int = 10
    prompt: int = 16
    length: int = 64
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_fields(
            self, "on_policy", every="[1, inf)", prompt="[1, inf)", length="[1, 1e6]", temperature="(0, inf)"
        )

    def planned(self, data: Calibration) -> Calibration:
        """Examples of the greatest length, for plans."""
        begins = data.max_length if data.columns.messages or data.columns.spans else self.prompt
        begins = min(begins, data.max_length)
        one = Example("a", ((begins, begins + self.length),), tokens=(0,) * (begins + self.length))
        return data.with_examples([[one] * len(own) for own in data.examples])


def check_on_policy(
    settings: OnPolicy, recipe: Recipe, opened: Opened, objective: Objective, data: Calibration
) -> None:
    """Raise ValueError for a fit that cannot learn from texts of its own; lists every reason."""
    if problems := [*_problems(settings, recipe, opened, objective, data)]:
        raise ValueError("\n".join(f"model.on_policy: {problem}" for problem in problems))


def _problems(
    settings: OnPolicy, recipe: Recipe, opened: Opened, objective: Objective, data: Calibration
) -> Iterator[str]:
    output = output_of(opened.base.path)
    if output.kind != WRITERS:
        yield f"{output.architecture} is a {output.kind}, which writes no texts: leave on_policy out"
    if objective.asks.temperature is None:
        yield "the objective needs the experts' predictions: use trainmerge.JensenShannon or Alignment"
    if heads := [name for name, head in task_heads(recipe, opened).items() if head is not None]:
        yield f"{heads} have heads, and what is written has no class: leave their heads out"
    columns = data.columns
    if others := [name for name in (columns.target, columns.pair, *columns.media) if name]:
        yield f"prompts are texts or chats, and data.columns has {others}: leave them out"
    limit = output.positions.text
    if (
        limit
        and min(data.max_length, limit) + settings.length > limit
        and (columns.messages or columns.spans)
    ):
        yield (
            f"prompts of data.max_length {data.max_length} and {settings.length} written tokens are over the "
            f"model's limit of {limit}: set data.max_length to {max(1, limit - settings.length)} or less"
        )
    elif limit and settings.prompt + settings.length > limit:
        yield f"prompt + length is over the model's limit of {limit} tokens: lower them"
