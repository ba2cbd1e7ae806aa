"""Models that a document names by their ids on the hub, as folders of its cache."""

from dataclasses import replace
from pathlib import Path

from trainmerge.merging.document import Document
from trainmerge.merging.tokenizer import AUTO, TokenizerSettings
from trainmerge.system.hub import folder_of, is_hub_id

WORDS = ("base", "union", AUTO)


def located(document: Document) -> Document:
    """The document with a folder for every id; a model that is not in the hub's cache is downloaded.

    Raises:
        FileNotFoundError: an id that is neither in the cache nor can be downloaded.
    """
    return replace(
        document,
        models={_folder(name): parameters for name, parameters in document.models.items()},
        base=None if document.base is None else _folder(document.base),
        tokenizer=_tokenizer(document.tokenizer),
    )


def model_and_adapter(name: str) -> list[str]:
    """A model, or a model and its adapter."""
    return [name] if Path(name).is_dir() else name.split("+")


def _folder(name: str) -> str:
    return "+".join(str(folder_of(part)) for part in model_and_adapter(name))


def _tokenizer(own: TokenizerSettings) -> TokenizerSettings:
    tokens = {
        token: row if row.model is None else replace(row, model=_folder(row.model))
        for token, row in own.tokens.items()
    }
    source, template = own.source, own.chat_template
    return replace(
        own,
        source=source if source is None or source in WORDS else _folder(source),
        tokens=tokens,
        chat_template=_folder(template) if template and is_hub_id(template) else template,
    )
