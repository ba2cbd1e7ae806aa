"""The calibration texts that a router is fitted to, and the ones that it is judged by."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from trainmerge.data.examples import Example, read_examples
from trainmerge.data.held_out import split
from trainmerge.run.folder import RunFolder
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_files import text_files
from trainmerge.run.sources import columns_of

HELD_OUT = 0.25  # of the texts


class RouterTexts(NamedTuple):
    """One expert's calibration examples in two parts."""

    fitted: Sequence[Example]
    held_out: Sequence[Example]


def router_texts(
    recipe: Recipe, run: RunFolder, render: Callable[[Sequence[Mapping[str, str]]], Example]
) -> dict[str, RouterTexts]:
    """Expert -> its calibration examples, as the run's fit read them; `render` is the tokenizer's, of chats.

    Raises:
        ValueError: an expert without calibration texts in a file, or with a single one.
    """
    columns, most = columns_of(run.path), run.read_manifest()["data"].get("max_examples")
    found = {}
    for number, (name, file) in enumerate(text_files(recipe).items()):
        examples = read_examples(file, columns, render, most)
        if len(examples) < 2:
            raise ValueError(f"{file}: the expert {name} has one text, and routers need two or more")
        found[name] = RouterTexts(*split(examples, HELD_OUT, 0, number))
    return found
