"""One self-contained HTML page: no scripts, no network requests."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
from matplotlib.figure import Figure

from trainmerge.report.picture import INK

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
CSS = """
:root { color-scheme: light dark; --paper: #fbfbf9; --card: #ffffff; --ink: #1b1f27; --quiet: #646b76;
  --line: #e3e4e2; --mark: #0a5fa5; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --card: #1b1f26; --ink: #e6e8eb;
  --quiet: #9aa2ad; --line: #2c323b; --mark: #7fb8ea; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main, footer { max-width: 1020px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 44px; }
h1 { font-size: 30px; margin: 0 0 2px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 6px; }
.under { color: var(--quiet); margin: 0 0 20px; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 0 0 18px; padding: 0; }
.facts div, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.facts div { padding: 10px 14px; }
.facts dt { color: var(--quiet); font-size: 12.5px; }
.facts dd { margin: 0; font-size: 20px; font-variant-numeric: tabular-nums; }
nav { margin: 0 0 18px; color: var(--quiet); font-size: 13.5px; }
a { color: var(--mark); text-decoration: none; } a:hover { text-decoration: underline; }
section { padding: 18px 20px 14px; margin: 0 0 18px; }
section p { max-width: 76ch; margin: 0 0 12px; color: var(--quiet); }
figure { margin: 0; overflow-x: auto; }
figure svg { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { font-size: 12.5px; color: var(--quiet); margin-top: 6px; text-align: right; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, .texts th { text-align: left; }
td.wide { white-space: normal; overflow-wrap: anywhere; text-align: left; }
th { color: var(--quiet); font-weight: 600; } tr.best td { font-weight: 700; }
tbody tr:last-child td { border-bottom: 0; }
code { font: 12.5px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere; }
footer { color: var(--quiet); font-size: 13px; padding-bottom: 44px; }
@media print { section { break-inside: avoid; } nav { display: none; } }
"""


@dataclass(frozen=True)
class Section:
    """A heading, a text, and some HTML."""

    anchor: str
    title: str
    words: str
    body: str


def page(title: str, under: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The whole page, as text."""
    boxes = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    links = " · ".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections)
    bodies = "\n".join(
        f'<section id="{s.anchor}"><h2>{escape(s.title)}</h2>\n<p>{_words(s.words)}</p>\n{s.body}</section>'
        for s in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escape(title)} · trainmerge</title>
<style>{CSS}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="under">{escape(under)}</p>
<dl class="facts">{boxes}</dl>
<nav aria-label="sections">{links}</nav>
</header>
<main>
{bodies}
</main>
<footer>Made by trainmerge from the run folder; this page loads nothing from the network.</footer>
</body>
</html>
"""


def _words(text: str) -> str:
    """Prose as HTML; text in backticks becomes code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def drawing(figure: Figure, name: str, alt: str, files: Sequence[str]) -> str:
    """A figure as inline SVG in the page's text colour, with links to its files."""
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same ids each time
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    head, _, rest = text[text.index("<svg") :].partition("<metadata>")  # only names of formats in it
    svg = (head + rest.rpartition("</metadata>")[2]).replace(INK, "currentColor")
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)  # no two pictures share an id
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)
    links = " · ".join(f'<a href="{escape(file)}">{escape(file)}</a>' for file in files)
    return f"<figure>\n{svg}\n<figcaption>{links}</figcaption></figure>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], best: int = -1, wide: bool = False) -> str:
    """A table with row `best` in bold; the cells of `wide` tables wrap their text."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    cell = '<td class="wide">' if wide else "<td>"
    body = "".join(
        f"<tr{' class=best' if i == best else ''}><td>{escape(row[0])}</td>"
        + "".join(f"{cell}{escape(value)}</td>" for value in row[1:])
        + "</tr>"
        for i, row in enumerate(rows)
    )
    kind = ' class="texts"' if wide else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
