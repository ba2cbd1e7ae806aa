"""Text of others inside Markdown: names that stay names."""

import re
from html import escape

from trainmerge.export.public import one_line

MARKS = re.compile(r"([\\`*_{}\[\]#|$~!-])")


def inline(text: str) -> str:
    r"""A name as one line of text: no markup, link, HTML, formula or table cell begins in it.

    >>> inline("a|b"), inline("<b>"), inline("plain name")
    ('a\\|b', '&lt;b&gt;', 'plain name')
    """
    return MARKS.sub(r"\\\1", escape(one_line(text), quote=False))


def code(text: str) -> str:
    """A name in code style if it has no special character, as `inline` otherwise."""
    return f"`{text}`" if re.fullmatch(r"[\w./ -]+", text) and one_line(text) == text else inline(text)


def code_block(text: str, language: str) -> str:
    """A block of code, in a fence longer than any within it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{fence}"
