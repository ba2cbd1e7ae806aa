"""What `trainmerge auto` would do with a configuration, before a weight is read.

Legend: `K` experts.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from trainmerge.auto.choice import Choice
from trainmerge.auto.judging import Judged
from trainmerge.auto.scales import most_merges
from trainmerge.auto.search import CHUNKS, FINALISTS, AutoSearch, learns_in_chunks
from trainmerge.auto.starts import Start
from trainmerge.coefficients.layer_least_squares import LayerLeastSquares
from trainmerge.fitting.held_out import EXAMPLES, judge_of
from trainmerge.preprocess import Informed
from trainmerge.run.config import read_config, to_config
from trainmerge.run.folder import RunFolder
from trainmerge.run.recipe import Recipe


@dataclass(frozen=True)
class Preview:
    """The search that `auto_config` would make.

    Args:
        tried: The starts that would be judged.
        left_out: Start -> why it would be left out.
        judge: The loss that judges, by its class.
        objective: The loss that learns, by its class.
        examples: Examples per expert that a merge is judged by, of the expert with most.
        merges: The most merges that are judged before learning.
        steps: The most steps of each fit.
        batch_size: Examples per expert of such a step.
        recipe: The configuration's.
    """

    tried: list[Start]
    left_out: Mapping[str, str]
    judge: str
    objective: str
    examples: int
    merges: int
    steps: int
    batch_size: int
    recipe: Recipe

    @property
    def fits(self) -> int:
        """How many fits: one from each of the best starts."""
        return min(FINALISTS, len(self.tried))

    def judging_seconds(self, computing: float, merging: float) -> float:
        """Seconds of all judged merges, from those of a step: its forwards and backwards, and the rest.

        A backward takes two forwards' time; a merge is judged by forwards alone.
        """
        return self.merges * (computing / 3 * self.examples / self.batch_size + merging)


def preview_auto(config: Path, held_out: float = 0.2) -> Preview:
    """The search of `auto_config` for a configuration; headers and examples are read, no weight.

    Each start's preprocessors are tried on the smallest tensor, so that those that refuse these experts are
    known.

    Raises:
        ValueError: as `auto_config`, before its first merge.
    """
    with TemporaryDirectory() as place:
        search = AutoSearch(config, Path(place) / "auto", held_out, None, None)
        refused = {name: why_refused(judged) for name, judged in search.judged.items()}
        tried = [judged.start for name, judged in search.judged.items() if not refused[name]]
        module, data = search.settings.module, search.settings.data
        judging = [*data.held_out_part(EXAMPLES).examples, *data.learning_part(EXAMPLES).examples]
        common = sum(most_merges(start.scales) for start in tried)
        return Preview(
            tried,
            {name: reason for name, reason in refused.items() if reason},
            type(judge_of(module.objective)).__name__,
            type(module.objective).__name__,
            max(map(len, judging)),
            common + min(FINALISTS, len(tried)) * (2 * search.K + 2),
            search.settings.trainer.max_steps,
            data.batch_size,
            module.recipe,
        )


def why_refused(judged: Judged) -> str:
    """Why a start cannot be made of these experts; empty if nothing is known against it."""
    opened = judged.inputs.opened
    matrices = [name for name in opened.layout.groups if len(opened.task_vectors.deltas[name].shape) == 2]
    if isinstance(judged.start.initial, LayerLeastSquares) and not matrices:
        return "no linear layer is merged"
    vectors = opened.task_vectors
    smallest = min(vectors.deltas, key=lambda name: vectors.deltas[name].base.numel(), default=None)
    if smallest is None:
        return ""
    vectors = replace(vectors, deltas={smallest: vectors.deltas[smallest]})
    try:
        for method in judged.start.preprocess:
            if isinstance(method, Informed):
                break  # it and those after it need the experts' outputs
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                vectors = vectors.replaced({name: taus.unbind() for name, taus in method(vectors)})
    except ValueError as error:
        return str(error)
    return ""


def finished_search(place: Path, recipe: Recipe) -> Choice | None:
    """What a finished `auto_config` in the folder `place` chose; None if there is none of this recipe.

    The preprocessors may differ, and the fits' chunks: they are what was chosen.

    Raises:
        ValueError: `auto.json` is damaged.
    """
    if not (place / "auto.json").is_file():
        return None
    choice = Choice.read(place)
    file = RunFolder(choice.run).recipe
    if not file.is_file():  # as after the folder was deleted, of which the table says nothing
        return choice
    found = read_config(Recipe, "recipe", file)
    if learns_in_chunks(recipe) and (found.grouping.granularity, found.grouping.chunks) == ("chunk", CHUNKS):
        found = replace(found, grouping=replace(found.grouping, granularity="tensor", chunks=1))
    return choice if _merged(found) == _merged(recipe) else None


def _merged(recipe: Recipe) -> object:
    return to_config(replace(recipe, preprocess=()))
