"""A router from the calibration texts of a run, and its accuracy on texts that it was not fitted on."""

from typing import Any

from trainmerge.export.explain import Exported
from trainmerge.packed.router import TaskRouter, fit_router
from trainmerge.packed.text_rows import text_rows
from trainmerge.run.router_texts import router_texts
from trainmerge.run.sources import text_length


def router_of(exported: Exported) -> tuple[TaskRouter, dict[str, Any]]:
    """The router, and its entry in `packed.json`.

    Raises:
        ValueError: an expert without calibration texts, or fewer than two.
    """
    length, base = text_length(exported.run.path), exported.opened.base
    rows = text_rows(base, length, exported.opened.ignore)
    texts = router_texts(exported.recipe, exported.run, rows.tokenize.render)
    router = fit_router([rows(own.fitted) for own in texts.values()])
    hits = {
        task: float((router(rows(own.held_out)) == number).float().mean())
        for number, (task, own) in enumerate(texts.items())
    }
    told = {
        "accuracy": sum(hits.values()) / len(hits),
        "tasks": hits,
        "fitted_on": sum(len(own.fitted) for own in texts.values()),
        "held_out": sum(len(own.held_out) for own in texts.values()),
        "max_length": length,
        "ignore": list(exported.opened.ignore),
    }
    return router, told
