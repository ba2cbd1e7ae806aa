"""A router from the calibration texts of a run, and its accuracy on texts that it was not fitted on."""

from typing import Any

from trainmerge.data.calibration import Calibration
from trainmerge.export.explain import Exported
from trainmerge.packed.router import Router, fit_router
from trainmerge.packed.text_rows import text_rows
from trainmerge.run.recipe_files import text_files
from trainmerge.run.sources import columns_of, text_length

HELD_OUT = 0.2  # share of each task's texts
MOST = 512  # texts per task


def router_of(exported: Exported) -> tuple[Router, dict[str, Any]]:
    """The router, and what `packed.json` says of it.

    Raises:
        ValueError: an expert without calibration texts, or fewer than two.
    """
    recipe, run = exported.recipe, exported.run.path
    files = text_files(recipe)
    length, base = text_length(run), exported.opened.base
    data = Calibration(
        files,
        str(base.path),
        max_length=length,
        columns=columns_of(run),
        max_examples=MOST,
        held_out=HELD_OUT,
    )
    rows = text_rows(base, length, exported.opened.ignore)
    router = fit_router([rows(own) for own in data.examples])
    held = data.held_out_part().examples
    hits = {
        task: float((router(rows(own)) == number).float().mean())
        for number, (task, own) in enumerate(zip(files, held, strict=True))
    }
    told = {
        "accuracy": sum(hits.values()) / len(hits),
        "tasks": hits,
        "fitted_on": sum(map(len, data.examples)),
        "held_out": sum(map(len, held)),
        "max_length": length,
        "ignore": list(exported.opened.ignore),
    }
    return router, told
