"""The coefficients' gradient of every family of models on the device, against autograd through the merge."""

import warnings
from collections.abc import Iterator

import torch
from transformers.utils import logging

from tests.gpu.setting import Row, Setting, row
from tests.gradient_sweep import FORMS, Found, sweep
from tests.model_families import FAMILIES
from tests.task_families import TASK_FAMILIES
from trainmerge.kernels import using

TINY = ("Llama", "BERT")


def run(setting: Setting) -> Iterator[Row]:
    """Raises AssertionError with every family whose gradient is wrong."""
    logging.set_verbosity_error()
    torch.backends.cudnn.allow_tf32 = False  # of convolutions, on by default: three digits
    families = FAMILIES | TASK_FAMILIES
    chosen = {n: families[n] for n in TINY} if setting.tiny else families
    bad: list[str] = []
    for backend in setting.backends:
        worst = Found(0.0, 0.0, 0, 0)
        for name, family in chosen.items():
            for form in FORMS:
                found = one(setting, backend, family, form)
                if found is None:  # no such layer to change
                    continue
                if not isinstance(found, Found) or not found.right:
                    bad.append(f"{name} {form} {backend}: {found}")
                else:
                    worst = max(worst, found, key=lambda f: f.tensor)
        yield row(f"gradients_{backend}_families", len(chosen), "families")
        yield row(f"gradients_{backend}_worst", worst.tensor, "relative error of a tensor's coefficients")
    assert not bad, "\n".join(bad)


def one(setting: Setting, backend: str, family: object, form: str) -> Found | Exception | None:
    """A family's errors; what it raised, so that the others still run."""
    try:
        with using(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sweep(family, form, device=setting.device)  # type: ignore[arg-type]
    except Exception as error:  # whatever it is, it is reported with its family
        return error
