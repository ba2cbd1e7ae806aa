"""A chat as the text of the model's template, and the characters of the assistant's turns."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from trainmerge.data.examples import ASSISTANT, Example

GENERATION = r"\{%-?\s*generation\b"  # a template's own mark of what the assistant writes
CLOCK = "strftime_now"  # transformers' function of a template for the current date
MARK = "CONTENT"  # in place of a turn's content, to find what is around it
DATE = datetime(2024, 7, 26)  # the date that Llama 3's template has where there is no clock
CODES = ["%-d", "%-m", "%e", *(f"%{code}" for code in "aAbBcdDfFHIjmMpSTuwxXyYZz")]


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> Example:
    """A chat as a text with special tokens; the assistant's characters are its spans.

    The template's `{% generation %}` marks them. Without such marks, a turn begins where the turns before it
    end, with the prompt for an answer, and ends where the chat up to it ends. A template that asks for the
    current date gets a fixed one: 26 July 2024.

    A turn that the template writes in another way once later turns follow (it leaves out earlier reasoning,
    say) cannot be located, and has no span.

    Raises:
        ValueError: the tokenizer has no template, or it rejects the chat.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; use a text column, or set "
            "recipe.chat_template to an expert that has one"
        )
    chat = [dict(message) for message in messages]
    template = tokenizer.get_chat_template()
    if not isinstance(template, str):
        raise ValueError(f"the tokenizer's chat template is {template!r}, which is not a text")
    if re.search(GENERATION, template):
        whole, spans = _rendered(tokenizer, template, chat, return_assistant_tokens_mask=True)
    else:
        whole, spans = _located(tokenizer, template, chat)
    return Example(whole, tuple((begin, end) for begin, end in spans if begin < end), templated=True)


def around_turn(tokenizer: Any, before: Sequence[Mapping[str, Any]], role: str) -> tuple[str, str]:
    """The template's text up to a turn's content, and from its end; `before` are the turns before it.

    Raises:
        ValueError: as `render_chat`, or the template does not write the content as it is.
    """
    text = render_chat(tokenizer, [*before, {"role": role, "content": MARK}]).text
    opening, found, closing = text.rpartition(MARK)
    if not found:
        raise ValueError(f"the chat template does not write the content of a turn of the {role}")
    return opening, closing


def _located(tokenizer: Any, template: str, chat: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """The whole text, and those of the assistant's turns that are differences of its prefixes."""
    whole, _ = _rendered(tokenizer, template, chat)
    spans = []
    for turn, message in enumerate(chat):
        if message["role"] == ASSISTANT:
            before, _ = _rendered(tokenizer, template, chat[:turn], add_generation_prompt=True)
            after, _ = _rendered(tokenizer, template, chat[: turn + 1])
            if whole.startswith(after) and after.startswith(before):
                spans.append((len(before), len(after)))
    return whole, spans


def _rendered(
    tokenizer: Any, template: str, chat: list[dict[str, Any]], **options: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The text, and the characters within `{% generation %}` if they are requested."""
    fixed = _clock() + template if CLOCK in template else template
    names: dict[str, Any] = {**tokenizer.special_tokens_map, **options}
    try:
        result: Any = render_jinja_template([chat], chat_template=fixed, **names)
    except Exception as error:  # of any type: the template is a stranger's program
        raise ValueError(f"the chat template rejects it: {error}") from error
    (text,), spans = result
    return str(text), [(int(begin), int(end)) for begin, end in (spans[0] if spans else [])]


def _clock() -> str:
    """A macro in place of transformers' clock, so that a text does not depend on the day."""
    changes = "".join(f"|replace({code!r}, {DATE.strftime(code)!r})" for code in CODES)
    return f"{{% macro {CLOCK}(form) %}}{{{{ form{changes} }}}}{{% endmacro +%}}"
