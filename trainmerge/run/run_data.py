"""The calibration data of a run, read again with the settings of its manifest."""

from trainmerge.data.calibration import Calibration
from trainmerge.data.columns import Columns
from trainmerge.run.folder import RunFolder
from trainmerge.run.recipe import Recipe
from trainmerge.run.recipe_files import calibration_files


def run_data(folder: RunFolder, recipe: Recipe, examples: int | None = None) -> Calibration:
    """The examples of a run's fit. `examples`: the first so many per expert; by default all."""
    made = folder.read_manifest()["data"]
    settings = made | {"columns": Columns(**made["columns"])}
    if not recipe.choice.is_default:  # the manifest has its name only
        settings["tokenizer"] = recipe.tokenizer_folder(folder.workspace)
    if examples is not None:
        settings["max_examples"] = min(examples, settings["max_examples"] or examples)
    return Calibration(calibration_files(recipe), **settings)
