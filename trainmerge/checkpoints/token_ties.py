"""Adapters that train some tokens' embeddings (peft's `trainable_token_indices`), on tied and untied bases.

On a tied base such an adapter changes the rows of embedding and head together, on an untied one the
embedding's only. Its file is the same in both cases: the base that it was trained on decides what it means.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path

from trainmerge.checkpoints.model_config import read_model_config
from trainmerge.checkpoints.parameters import Parameters
from trainmerge.checkpoints.ties import declared_ties
from trainmerge.system.access import is_folder

DELTA = "trainable_tokens_delta"  # the last part of such a tensor's name


def token_tie_problems(base: Parameters, adapter: Path, keys: Iterable[str], recorded: object) -> list[str]:
    """One line if the adapter was trained on a base with other ties; a warning if that cannot be known.

    Args:
        base: The base that it is merged into.
        adapter: Its folder.
        keys: Its tensors, under the base's module names.
        recorded: Its `base_model_name_or_path`.
    """
    modules = {key.partition(f".{DELTA}")[0].removesuffix(".token_adapter") for key in keys if DELTA in key}
    alone = [
        (embedding, head)
        for head, embedding in declared_ties(base.meta_model).items()
        if embedding.removesuffix(".weight") in modules and head.removesuffix(".weight") not in modules
    ]
    if not alone:
        return []
    embedding, head = alone[0]
    tied = head in base.meta_model.all_tied_weights_keys
    sides = f"embedding and head, {embedding} and {head}" if tied else f"the embedding alone, {embedding}"
    what = f"its trainable tokens change {sides}, because the base {_ties(tied)} these"
    folder = next(
        (one for one in (adapter, Path(str(recorded))) if is_folder(one) and (one / "config.json").is_file()),
        None,
    )
    if folder is None:
        if not _is_name_of(base.checkpoint.path, recorded):
            warnings.warn(
                f"{adapter}: {what}. That is another function than the adapter's if its own base, "
                f"{recorded!r}, {_ties(not tied)} them; it is not on disk, so this was not checked",
                stacklevel=2,
            )
        return []
    config = read_model_config(folder).get_text_config()
    if bool(getattr(config, "tie_word_embeddings", False)) == tied:
        return []
    return [
        f"{adapter}: {what}, and {folder / 'config.json'}, of the adapter's own base, {_ties(not tied)} "
        "them: the merge would be another function than the adapter. Use that base; or merge the adapter "
        "into it with peft, and name the result as an expert"
    ]


def _ties(tied: bool) -> str:
    return "ties" if tied else "does not tie"


def _is_name_of(folder: Path, recorded: object) -> bool:
    """Whether a recorded name is the folder's: its last part, or its hub id in a hub cache."""
    if not isinstance(recorded, str) or not recorded.strip("/"):
        return False
    place = folder.resolve()
    cached = f"models--{recorded.replace('/', '--')}"
    return place.name == recorded.rstrip("/").rpartition("/")[2] or cached in place.parts
