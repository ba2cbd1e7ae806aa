"""The files of examples that a recipe names."""

from trainmerge.data.generate import Generate
from trainmerge.run.recipe import Recipe


def calibration_files(recipe: Recipe) -> dict[str, str | Generate]:
    """Expert -> its file of unlabeled examples, or the texts that it writes, if it has either."""
    return {name: expert.calibration for name, expert in recipe.experts.items() if expert.calibration}


def text_files(recipe: Recipe) -> dict[str, str]:
    """Every expert -> its file of unlabeled examples.

    Raises:
        ValueError: an expert has none, or writes its examples itself.
    """
    given = calibration_files(recipe)
    files = {name: file for name, file in given.items() if isinstance(file, str)}
    if absent := [name for name in recipe.experts if name not in files]:
        raise ValueError(
            f"recipe.experts: no calibration texts in a file for {', '.join(absent)}: give `calibration` a "
            "file; what experts wrote themselves is in the run's workspace, as generated-NAME-....jsonl"
        )
    return files


def test_files(recipe: Recipe) -> dict[str, str]:
    """Expert -> its test examples, if it has any."""
    return {name: expert.test for name, expert in recipe.experts.items() if expert.test}
