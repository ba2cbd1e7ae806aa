"""What becomes of batch norms' statistics in a run's merge: the recipe's rule, by the base's tensor names.

Re-estimated ones are of one merge: a fit measures them at its end and leaves them in the run folder with the
digest of the coefficients that they belong to.
"""

import hashlib
from collections.abc import Mapping

from torch import Tensor

from trainmerge.checkpoints import Checkpoint
from trainmerge.coefficients.coefficients import Coefficients
from trainmerge.run.folder import RunFolder
from trainmerge.run.opened import Opened
from trainmerge.run.recipe import Recipe
from trainmerge.system.atomic import replacing
from trainmerge.system.safetensors_file import MappedFile, write_safetensors
from trainmerge.task_vectors.buffers import average_buffers

REESTIMATE = "reestimate"
OF = "coefficients"  # the key of the digest in the file's header


def merge_buffers(
    folder: RunFolder, recipe: Recipe, opened: Opened, coefficients: Coefficients
) -> Mapping[str, Tensor]:
    """The merge's statistics that are not the base's, by the base's tensors.

    Raises:
        ValueError: they are to be estimated again, and the run has none of these coefficients.
    """
    if recipe.buffers != REESTIMATE:
        return averaged(recipe, opened.base, opened)
    if not are_current(folder, coefficients):
        raise ValueError(
            f"{folder.statistics}: no statistics of batch norms of these coefficients (recipe.buffers is "
            f"{REESTIMATE}); a fit measures them at its end, for its own coefficients. Resume the fit to its "
            "end, or fit with `buffers: average`"
        )
    file = MappedFile(folder.statistics)
    return {name: file.read(name) for name in file.tensors}


def averaged(recipe: Recipe, base: Checkpoint, opened: Opened) -> dict[str, Tensor]:
    """The mean of the experts' statistics by their weights, if this is the rule; else none."""
    own = opened.own_statistics
    if recipe.buffers != "average" or not own[0]:
        return {}
    ours = {name: base.read(name) for name in own[0]}
    weights = [expert.weight for expert in recipe.experts.values()]
    return average_buffers(ours, own, list(ours), weights)


def are_current(folder: RunFolder, coefficients: Coefficients) -> bool:
    """Whether the run folder has the statistics of the merge with these coefficients."""
    if not folder.statistics.is_file():
        return False
    return MappedFile(folder.statistics).metadata.get(OF) == _digest(coefficients)


def save_statistics(folder: RunFolder, coefficients: Coefficients, values: Mapping[str, Tensor]) -> None:
    """Write the statistics of the merge with these coefficients."""
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in values.items()}
    with replacing(folder.statistics) as new:
        pieces = ((name, values[name].detach().cpu().contiguous()) for name in specs)
        write_safetensors(new, specs, pieces, {OF: _digest(coefficients)})


def _digest(coefficients: Coefficients) -> str:
    return hashlib.sha256(coefficients().detach().cpu().contiguous().numpy().tobytes()).hexdigest()
