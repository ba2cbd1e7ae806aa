"""From the tokenizer that a mergekit file names to a choice among the models that are merged."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from trainmerge.checkpoints.chat_template import chat_templates
from trainmerge.checkpoints.choice import BASE, UNION, TokenizerChoice, TokenRow
from trainmerge.checkpoints.tokenizer_check import same_ids
from trainmerge.checkpoints.vocabulary import same_files, tokenizer_files
from trainmerge.merging.tokenizer import AUTO, TokenizerSettings

Sides = Mapping[str, str]  # a model, as the file names it -> `base`, or the expert's name


def choose_tokenizer(
    tokenizer: TokenizerSettings, sides: Sides, folders: Mapping[str, Path], equal: bool
) -> TokenizerChoice:
    """The choice that a file means.

    Args:
        tokenizer: What the file says.
        sides: Its models.
        folders: `base`, the reference checkpoint, and every expert.
        equal: Whether no model of the merge is its base.

    Raises:
        ValueError: a tokenizer of a folder that is not merged, with other ids than the reference's.
    """
    source = side_of(tokenizer.source or BASE, sides)
    if source is None:
        _check_outside(str(tokenizer.source), folders[BASE])
        source = BASE
    tokens = tuple(
        (token, TokenRow(None if own.model is None else sides[own.model], own.token, own.force))
        for token, own in tokenizer.tokens.items()
    )
    by_token = tokenizer.source is not None and source == BASE and _differ(folders)
    template = _template(tokenizer, sides, folders, source)
    choice = TokenizerChoice(source, template, None, tokenizer.pad_to_multiple_of, by_token, False, tokens)
    return replace(choice, equal=equal) if choice.moves_rows else choice


def side_of(name: str, sides: Sides) -> str | None:
    """The side that a name or folder means; None if it is none of the models."""
    if name in (BASE, UNION):
        return name
    place = Path(name).resolve()
    same = (side for model, side in sides.items() if name == model or Path(model).resolve() == place)
    return next(same, None)


def foreign_tokenizer(tokenizer: TokenizerSettings, sides: Sides) -> Path | None:
    """The folder of a tokenizer that is none of the models'."""
    source = tokenizer.source
    return Path(source) if source is not None and side_of(source, sides) is None else None


def _check_outside(source: str, reference: Path) -> None:
    folder = Path(source)
    if not folder.is_dir() or not tokenizer_files(folder):
        raise ValueError(f"tokenizer_source: {source} has no tokenizer files")
    if tokenizer_files(reference) and not (same_files(folder, reference) or same_ids(folder, reference)):
        raise ValueError(
            f"tokenizer_source: {source} is none of the merged models, and its tokens have other ids than "
            f"those of {reference}: name a merged model, base or union"
        )


def _differ(folders: Mapping[str, Path]) -> bool:
    """Whether an expert's tokenizer may differ from the reference's."""
    ours = folders[BASE]
    named = [folder for folder in folders.values() if tokenizer_files(folder)]
    return bool(tokenizer_files(ours)) and any(not same_files(ours, folder) for folder in named)


def _template(
    tokenizer: TokenizerSettings, sides: Sides, folders: Mapping[str, Path], owner: str
) -> str | None:
    """The side whose chat template the merge has; None is the tokenizer's, or the file's own text."""
    name = tokenizer.chat_template
    if name is None or tokenizer.template_text is not None:
        return None
    if name != AUTO:
        return side_of(name, sides)
    found = {side: text.strip() for side, text in chat_templates(folders).items()}
    if not found:
        print("chat_template auto: no model has a chat template", flush=True)
        return None
    (text, _), *_ = Counter(found.values()).most_common(1)
    return None if found.get(owner) == text else next(side for side, own in found.items() if own == text)
