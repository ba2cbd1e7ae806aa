"""The chat template of a merge, with the special tokens that it names."""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainmerge.checkpoints.choice import BASE
from trainmerge.checkpoints.tokenizer_choice import Chosen
from trainmerge.checkpoints.vocabulary import SETTINGS, build_tokenizer, tokenizer_files
from trainmerge.system.json_file import read_json
from trainmerge.system.text import listed, reason

REMEDY = "Download or save it again."
TEMPLATE, SPECIAL = "chat_template.jinja", "special_tokens_map.json"
TEMPLATES = (TEMPLATE, "chat_template.json")
MARKED = re.compile(r"<\|[^|<>{}\s]+\|>")  # tokens as chat templates write them
ROLES = ("bos_token", "eos_token", "pad_token")  # that a template may name


def take_template(chosen: Chosen, tokenizers: Mapping[str, Any], target: Path) -> None:
    """Write the chat template of the choice, and the special tokens that it names."""
    name = chosen.choice.chat_template or _default_template(chosen, tokenizers)
    if name is None or name == chosen.owner:
        return
    template = _template(tokenizers.get(name))
    if template is None:
        raise ValueError(
            f"{chosen.folders[name]}: no chat template in it, and chat_template is {name!r}: name "
            "one that has it"
        )
    tokens, text = chosen.vocabularies[name], json.dumps(template)
    roles = {role: str(own) for role in ROLES if (own := getattr(tokenizers[name], role, None))}
    literal = [t for i in sorted(tokens.added) if (t := tokens.tokens.get(i)) and json.dumps(t)[1:-1] in text]
    lost = [token for token in dict.fromkeys([*literal, *roles.values()]) if token not in chosen.ids]
    if lost:
        raise ValueError(
            f"{chosen.folders[name]}: its chat template writes {listed([*map(repr, lost)])}, which the "
            "merge's tokenizer lacks: set tokenizer: union"
        )
    write_template(target, template, roles)


def write_template(target: Path, template: str, roles: Mapping[str, str]) -> None:
    """Replace a folder's chat template, and the special tokens of these roles."""
    for file in TEMPLATES:
        (target / file).unlink(missing_ok=True)
    (target / TEMPLATE).write_text(template, encoding="utf-8")
    for file in (SETTINGS, SPECIAL):
        if file == SETTINGS or (target / file).is_file():
            old = read_json(target / file, REMEDY) if (target / file).is_file() else {}
            old.pop("chat_template", None)
            save(target / file, {**old, **roles})


def check_template(folder: Path, template: str) -> None:
    """Write one message by a template's text; warn of tokens in it that the folder's tokenizer lacks.

    Raises:
        ValueError: the folder has no tokenizer, or the text is no template for a user's message.
    """
    tokenizer = open_tokenizer(folder)
    try:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello"}],
            chat_template=template,
            add_generation_prompt=True,
            tokenize=False,
        )
    except Exception as error:  # of Jinja, or of the template's own
        raise ValueError(f"chat_template: it cannot write a user's message ({reason(error)})") from error
    known = tokenizer.get_vocab()
    lost = [token for token in dict.fromkeys(MARKED.findall(template)) if token not in known]
    if lost:
        warnings.warn(
            f"chat_template: {listed([*map(repr, lost)])} are no tokens of the merge's tokenizer, which "
            "reads them as ordinary text; set the tokenizer's source to union, or to a model that has them",
            stacklevel=2,
        )


def chat_templates(folders: Mapping[str, Path]) -> dict[str, str]:
    """The chat template of every folder that has one."""
    loaded = {name: open_tokenizer(folder) for name, folder in folders.items() if tokenizer_files(folder)}
    return {name: text for name, tokenizer in loaded.items() if (text := _template(tokenizer))}


def _default_template(chosen: Chosen, tokenizers: Mapping[str, Any]) -> str | None:
    """Whose template the merge has, unless the choice names one; None if that is nobody's."""
    own = {name: text for name, tokenizer in tokenizers.items() if (text := _template(tokenizer))}
    if chosen.owner in own:
        others = [name for name, text in own.items() if text != own[chosen.owner]]
        if others:
            warnings.warn(
                f"the chat template of {listed(others)} is another than {chosen.owner}'s, which the merge "
                f"has: set chat_template: {others[0]} if theirs is meant",
                stacklevel=2,
            )
        return chosen.owner
    if chosen.choice.tokenizer == BASE or not own:
        return None
    if len({*own.values()}) > 1:
        warnings.warn(
            f"the base has no chat template, and those of {listed([*own])} differ: the merge has none; set "
            f"chat_template: {next(iter(own))}, say",
            stacklevel=2,
        )
        return None
    return next(iter(own))


def _template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template.get("default") if isinstance(template, Mapping) else template


def open_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder, without its code. Raises ValueError if it has none."""
    try:
        return build_tokenizer(folder)
    except Exception as error:  # a foreign parser
        raise ValueError(f"{folder}: no tokenizer that transformers can load ({reason(error)})") from error


def save(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
