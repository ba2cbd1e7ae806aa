"""Load a folder's tokenizer, without its code."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from trainmerge.system.atomic import seen_from
from trainmerge.system.links import check_link
from trainmerge.system.text import reason

FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "config.json", "merges.txt",
    "preprocessor_config.json", "processor_config.json", "sentencepiece.bpe.model", "special_tokens_map.json",
    "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip


PROCESSORS = ("preprocessor_config.json", "processor_config.json")
NEITHER = {"config.json", *PROCESSORS}  # files of `FILES` that a model without a tokenizer has too


def takes_text(path: str) -> bool:
    """Whether the folder should have a tokenizer: not with a processor of pictures or sounds alone."""
    folder = Path(path)
    has = [name for name in FILES if (folder / name).is_file()]
    return not {*has} & {*PROCESSORS} or bool({*has} - NEITHER)


def present(tokenizer: Any, path: str) -> Any:
    """The tokenizer; raises ValueError if the folder has none."""
    if tokenizer is None:
        raise ValueError(
            f"{path}: it has no tokenizer, so it reads no texts: for pictures or sounds alone, set "
            "data.columns.text to null and data.columns.image or audio to their column"
        )
    return tokenizer


def load_tokenizer(path: str) -> Any:
    """The transformers tokenizer of a folder; it pads and truncates on the right.

    Raises:
        ValueError: not a folder, no tokenizer in it, none that can pad, or a link that leads outside.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(
            f"{path}: not a folder{seen_from(path)}. Name the base's folder: its tokenizer is used."
        )
    for name in FILES:
        check_link(folder, folder / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path,
            local_files_only=True,
            trust_remote_code=False,
            padding_side="right",
            truncation_side="right",
        )
    except Exception as error:  # the file is a stranger's, and the parser's errors are of many types
        raise ValueError(
            f"{path}: no tokenizer that transformers can load in it ({reason(error)}). Code from "
            "checkpoints is never run"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token  # padding is masked: any will do
    if tokenizer.pad_token is None:
        raise ValueError(
            f"{path}: its tokenizer has no token for padding, none for an end and none for unknown words: "
            "set pad_token in its tokenizer_config.json"
        )
    return tokenizer
