"""The tokenizer and chat template of a merge in a mergekit file.

tokenizer:
  source: union                    # or base, or a model
  tokens:
    <|im_end|>: {source: MODEL}                                   # the row of models that lack it
    <|pad|>: {source: {kind: zero}, force: true}                  # the row of all models
    <|eot|>: {source: {kind: model_token, model: MODEL, token: </s>}}
  pad_to_multiple_of: 64
chat_template: auto                # or chatml, or the text of a template
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ZERO, AUTO = "zero", "auto"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BUILT_IN = {"chatml": CHATML}
THEIRS = ("alpaca", "exaone", "llama3", "mistral")  # texts of mergekit, which are not ours to copy


@dataclass(frozen=True)
class TokenSource:
    """The row of one token: of a model, under another token or id there if it is named, or zeros."""

    model: str | None  # None: zeros
    token: str | int | None = None
    force: bool = False

    def to_plain(self) -> dict[str, Any]:
        """As in a file."""
        source: Any = self.model if self.token is None else {"kind": "model_token", "model": self.model}
        if self.token is not None:
            source["token_id" if isinstance(self.token, int) else "token"] = self.token
        forced = {"force": True} if self.force else {}
        return {"source": {"kind": ZERO} if self.model is None else source, **forced}


@dataclass(frozen=True)
class TokenizerSettings:
    """Whose tokenizer and chat template a merge has.

    Args:
        source: `base`, `union`, or a folder; None is the base's (or the first model's) as it is.
        tokens: Token -> the row that counts where a model lacks it.
        pad_to_multiple_of: Rows of the embedding are a multiple of this number.
        chat_template: `auto` (the most common one of the models), `base` or a model's folder (theirs),
            `chatml`, or a template's text. None is the tokenizer's.
    """

    source: str | None = None
    tokens: Mapping[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    chat_template: str | None = None

    @property
    def chooses_rows(self) -> bool:
        """Whether rows of embeddings are matched by token."""
        return self.source is not None or bool(self.tokens) or self.pad_to_multiple_of is not None

    @property
    def template_text(self) -> str | None:
        """The template's text, if it is none of a model's."""
        name = self.chat_template or ""
        return BUILT_IN.get(name, name if "{" in name else None)

    def problems(self, models: Mapping[str, Any], base: str | None) -> Iterator[str]:
        """What is wrong for a merge of these models."""
        known = {*models, *([base] if base else [])}
        for token, own in self.tokens.items():
            if own.model is not None and own.model not in known:
                yield f"tokenizer.tokens.{token}: {own.model} is none of the models that are merged"
        name = self.chat_template
        if name is None or name in (AUTO, "base", *known) or self.template_text is not None:
            return
        if Path(name).resolve() in {Path(own).resolve() for own in known}:
            return
        if name in THEIRS:
            yield (
                f"chat_template {name}: its text is mergekit's, and not part of trainmerge; write the "
                f"template itself, {AUTO}, or a model's folder"
            )
        else:
            yield (
                f"chat_template is {name!r}; it is {AUTO}, {', '.join(BUILT_IN)}, a merged model's folder, "
                "or the text of a Jinja template"
            )

    def to_plain(self) -> dict[str, Any]:
        """The keys of mergekit's file."""
        rest = {key: own.to_plain() for key, own in self.tokens.items()}
        template = {} if self.chat_template is None else {"chat_template": self.chat_template}
        if not rest and self.pad_to_multiple_of is None:
            return {**({} if self.source is None else {"tokenizer_source": self.source}), **template}
        padding = {} if self.pad_to_multiple_of is None else {"pad_to_multiple_of": self.pad_to_multiple_of}
        own = {"source": self.source, **({"tokens": rest} if rest else {}), **padding}
        return {"tokenizer": own, **template}


def read_tokenizer(content: Mapping[str, Any], problems: list[str]) -> TokenizerSettings:
    """The tokenizer of a mergekit file; what is wrong with it is added to `problems`."""
    template, new = content.get("chat_template"), content.get("tokenizer")
    if not isinstance(template, str | None):
        problems.append(f"chat_template is {template!r}, not a text")
        template = None
    old = content.get("tokenizer_source")
    if new is not None and old is not None:
        problems.append("tokenizer and tokenizer_source: write one of them")
    if new is None:
        new = {} if old is None else {"source": old}
    if not isinstance(new, Mapping):
        problems.append(f"tokenizer is {new!r}, not a mapping with `source`, `tokens`, `pad_to_multiple_of`")
        new = {}
    given = bool(new)
    if extra := sorted(map(str, new.keys() - {"source", "tokens", "pad_to_multiple_of"})):
        problems.append(f"tokenizer: no key {extra[0]!r}; there are source, tokens, pad_to_multiple_of")
    source = new.get("source") or ("union" if given else None)
    if not isinstance(source, str | None):
        problems.append(f"tokenizer source is {source!r}, not base, union or a model's folder")
        source = None
    multiple = new.get("pad_to_multiple_of")
    if multiple is not None and (type(multiple) is not int or multiple < 1):
        problems.append(f"tokenizer: pad_to_multiple_of is {multiple!r}, not a number of rows")
        multiple = None
    return TokenizerSettings(source, _tokens(new.get("tokens") or {}, problems), multiple, template)


def _tokens(given: Any, problems: list[str]) -> dict[str, TokenSource]:
    if not isinstance(given, Mapping):
        problems.append(f"tokenizer: tokens is {given!r}, not a mapping from tokens to their rows")
        return {}
    found: dict[str, TokenSource] = {}
    for token, own in given.items():
        read = _token(own)
        if isinstance(read, str):
            problems.append(f"tokenizer.tokens.{token}: {read}")
        else:
            found[str(token)] = read
    return found


def _token(own: Any) -> "TokenSource | str":
    """A token's row, or what is wrong with it."""
    if not isinstance(own, Mapping) or own.keys() - {"source", "force"} or "source" not in own:
        return f"{own!r} is not a `source`, with `force` or without"
    source, force = own["source"], own.get("force", False)
    if not isinstance(force, bool):
        return f"force is {force!r}, not true or false"
    if isinstance(source, str):
        return TokenSource(source, force=force)
    if source == {"kind": ZERO}:
        return TokenSource(None, force=force)
    named = isinstance(source, Mapping) and source.get("kind") == "model_token"
    if not named or source.keys() - {"kind", "model", "token", "token_id"}:
        return f"source is {source!r}; it is a model, {{kind: zero}}, or {{kind: model_token, model, token}}"
    words, number = source.get("token"), source.get("token_id")
    if not isinstance(source.get("model"), str) or (words is None) == (number is None):
        return "a model_token has a `model`, and a `token` or a `token_id`"
    if (words is not None and not isinstance(words, str)) or (number is not None and type(number) is not int):
        return "a `token` is a text, and a `token_id` a number"
    return TokenSource(source["model"], number if words is None else words, force)
