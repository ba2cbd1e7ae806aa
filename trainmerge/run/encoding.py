"""Whether an export's tokenizer reads the calibration chats as the fit's did."""

from pathlib import Path

from trainmerge.data.examples import Example, read_examples
from trainmerge.data.generate import Generate
from trainmerge.data.tokenizer import Tokenizer
from trainmerge.run.folder import RunFolder
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_files import calibration_files
from trainmerge.run.sources import columns_of, text_length
from trainmerge.system.text import shortened

LONGEST = 200  # characters of an example in an error


def check_encoding(run: RunFolder, recipe: Recipe, fitted: Path, exported: Path) -> int:
    """Render and encode the calibration chats with both tokenizers; returns the number of chats compared.

    The run has chats. Prints a line for files that are not here.

    Args:
        run: The run's folder.
        recipe: Its recipe.
        fitted: The folder of the fit's tokenizer.
        exported: The export's folder.

    Raises:
        ValueError: a chat with another text or other ids; with the chat.
    """
    columns = columns_of(run.path)
    length, most = text_length(run.path), run.read_manifest()["data"].get("max_examples")
    one, other = Tokenizer(str(fitted), length), Tokenizer(str(exported), length)
    count = 0
    for expert, file in calibration_files(recipe).items():
        if isinstance(file, Generate):
            print(f"the chats that {expert} wrote itself were not encoded again", flush=True)
            continue
        if not Path(file).exists():
            print(f"{file} is not here: the chats of {expert} were not encoded again", flush=True)
            continue
        ours = read_examples(file, columns, one.render, most)
        for mine, theirs in zip(ours, read_examples(file, columns, other.render, most), strict=True):
            _compare(expert, exported, one, other, mine, theirs)
            count += 1
    return count


def _compare(
    expert: str, exported: Path, one: Tokenizer, other: Tokenizer, mine: Example, theirs: Example
) -> None:
    if mine.text != theirs.text:
        raise ValueError(
            f"{exported}: its chat template writes a calibration chat of {expert} as "
            f"{shortened(repr(theirs.text), LONGEST)}, the fit's as {shortened(repr(mine.text), LONGEST)}"
        )
    ours, got = (words.encode([mine]).inputs["input_ids"][0].tolist() for words in (one, other))
    if ours != got:
        pairs = zip([*ours, None], [*got, None], strict=False)
        at = next(i for i, (a, b) in enumerate(pairs) if a != b)
        raise ValueError(
            f"{exported}: its tokenizer encodes a calibration chat of {expert} otherwise than the fit's, "
            f"from token {at} on: {got[at : at + 4]} instead of {ours[at : at + 4]}, in "
            f"{shortened(repr(mine.text), LONGEST)}"
        )
