"""`keep_better`: after a fit, keep the start or the end, whichever has the lower calibration loss."""

import json
import warnings

from rich.progress import track
from torch import Tensor

from trainmerge.data.calibration import Calibration
from trainmerge.fitting.calibration_loss import calibration_loss
from trainmerge.fitting.module import MergeModule
from trainmerge.run.folder import RunFolder
from trainmerge.run.saved import save_moment
from trainmerge.system import distributed
from trainmerge.system.atomic import write_whole


def save_better(module: MergeModule, data: Calibration, folder: RunFolder) -> None:
    """Compare start and end on all calibration examples; save the better one in the run folder."""
    end = module.coefficients().detach().cpu().clone()  # a copy: `load` may overwrite the parameter
    module.load(data)
    points = {"start": module.start, "end": end}
    losses = {}
    quiet = distributed.rank() > 0
    for point in track(points, description="comparing start and end", disable=quiet):
        losses[point] = _loss_at(module, data, points[point])
    better = "end" if losses["end"] < losses["start"] else "start"
    module.coefficients.reset_(points[better])
    if distributed.rank() == 0:
        _leave(module, folder, losses, better)


def _leave(module: MergeModule, folder: RunFolder, losses: dict[str, float], better: str) -> None:
    write_whole(folder.path / "calibration_loss.json", json.dumps(losses, indent=2))
    print(f"loss over all calibration examples: {losses['start']:.4f} -> {losses['end']:.4f}")
    if better == "end":
        return
    save_moment(folder, module.coefficients, step=0, steps=0)  # those of step 0, and the fit is finished
    warnings.warn(
        f"the loss over the calibration examples did not fall ({losses['start']:.4f} -> "
        f"{losses['end']:.4f}): the starting coefficients were saved instead. Lower the learning rate, or "
        "use more examples per step.",
        stacklevel=2,
    )


def _loss_at(module: MergeModule, data: Calibration, values: Tensor) -> float:
    module.coefficients.reset_(values)
    return calibration_loss(module, data)
