"""The tokenizer that a recipe's tasks are read with, and checkpoints that fit it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from trainmerge.checkpoints import Checkpoint, open_checkpoint, same_ids
from trainmerge.run.recipe import Recipe


@dataclass(frozen=True)
class Reading:
    """A recipe's tokenizer, in a folder that is there as long as the checkpoints are read.

    Args:
        recipe: The recipe.
        place: A folder for the merge's tokenizer and rows.
    """

    recipe: Recipe
    place: Path

    @property
    def tokenizer(self) -> str:
        """The folder of the merge's tokenizer."""
        return self.recipe.tokenizer_folder(self.place)

    def open(self, folder: Path) -> Checkpoint:
        """A checkpoint whose token ids are the merge's; the base has the merge's rows.

        Raises:
            ValueError: the recipe chooses a tokenizer, and the checkpoint's ids belong to other tokens.
        """
        recipe = self.recipe
        if not recipe.choice.moves_rows:
            return open_checkpoint(folder, recipe.allow_pickle)
        if folder.resolve() == recipe.folders["base"].resolve():
            return recipe.open(self.place, aligned=False).base
        if not same_ids(Path(self.tokenizer), folder):
            raise ValueError(
                f"{folder}: its token ids are not those of the recipe's merge (tokenizer: "
                f"{recipe.choice.tokenizer}): score an export of the merge, or the run, which has "
                "the experts too"
            )
        return open_checkpoint(folder, recipe.allow_pickle)


@contextmanager
def reading(recipe: Recipe) -> Iterator[Reading]:
    """The tokenizer of a recipe, for as long as checkpoints are read."""
    with TemporaryDirectory() as place:
        yield Reading(recipe, Path(place))
