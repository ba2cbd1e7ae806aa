"""A checkpoint's model on the meta device, which has no storage."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from trainmerge.checkpoints.model_config import cannot_build, read_model_config
from trainmerge.system.text import listed

SHOWN = 8  # tensors of one kind that an error lists by name


def build_meta_model(path: Path) -> PreTrainedModel:
    """The model on the meta device (without storage), dropout 0.

    Raises ValueError if transformers does not know the architecture or rejects config.json.
    """
    with quiet():
        config = read_model_config(path)
    try:
        with quiet(), torch.device("meta"):
            _for_learning(config)
            meta_model: PreTrainedModel = architecture_of(config)(config)
    except Exception as error:  # of many types, for a file that is a stranger's
        raise cannot_build(path, error) from error
    return meta_model


def architecture_of(config: PreTrainedConfig) -> Any:
    """The class that the checkpoint was saved with, or the one without a head.

    Raises:
        ValueError: the class is in the checkpoint's own code.
    """
    name = (config.architectures or [""])[0]
    kind: Any = getattr(transformers, name, None)
    if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
        return kind
    if name and any(str(own).endswith(f".{name}") for own in getattr(config, "auto_map", {}).values()):
        raise ValueError(f"{name} is in the checkpoint's own code, and not in transformers")
    return transformers.MODEL_MAPPING[type(config)]


def _for_learning(config: PreTrainedConfig) -> None:
    """No dropout, because losses must be deterministic, and no key-value cache; in sub-configs too."""
    if hasattr(config, "use_cache"):
        config.use_cache = False
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _for_learning(value)
        elif "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)


@contextmanager
def quiet() -> Iterator[None]:
    """In this context transformers and peft are silent; their settings are restored afterwards.

    The compilers' names too: peft's BOFT leaves gcc for C++, and then torch.compile links no loop.
    """
    compilers = {name: os.environ.get(name) for name in ("CC", "CXX")}
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, value in compilers.items():
            os.environ.pop(name, None)
            os.environ |= {name: value} if value is not None else {}
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def shorten(names: Sequence[str]) -> str:
    """The names, shortened to as many as an error lists."""
    return listed(names, SHOWN)
