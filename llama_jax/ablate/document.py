"""One text as Markdown and as a page of HTML: both are written from the same blocks.

All text is plain: what has a meaning in either language is escaped.
"""

import html
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1f24; --page: #ffffff; --line: #d5d9de; --mark: #fff3cd }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e6ea; --page: #16191d; --line: #3b4149; --mark: #453a14 }
}
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: var(--ink);
  background: var(--page); font: 1rem/1.5 system-ui, sans-serif }
h1, h2 { line-height: 1.2 }
h2 { margin-top: 2.5rem }
.notice { padding: .6rem 1rem; background: var(--mark) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
caption { text-align: left; padding-bottom: .3rem }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top }
.text { text-align: left }
td:not(.text) { white-space: nowrap }
figure { margin: 1.5rem 0 }
figcaption, caption { font-size: .9rem }
svg { max-width: 100%; height: auto; color: var(--ink); fill: currentColor }
pre { overflow-x: auto; padding: .6rem 1rem; border: 1px solid var(--line) }
"""


class Heading(NamedTuple):
    """Begins a section."""

    text: str


class Paragraph(NamedTuple):
    """Running text; a notice stands out."""

    text: str
    notice: bool = False


class Bullets(NamedTuple):
    """A list."""

    items: Sequence[str]


class Code(NamedTuple):
    """Text that is kept as it is, line by line."""

    text: str


class Table(NamedTuple):
    """Cells as text; all columns but the first `text_columns` hold numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    text_columns: int = 1


class Picture(NamedTuple):
    """NAME.png beside the Markdown; in HTML the SVG itself."""

    name: str
    caption: str


Block = Heading | Paragraph | Bullets | Code | Table | Picture


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """The text as GitHub's Markdown."""
    parts = [f"# {escape_markdown(title)}", *map(_markdown, blocks)]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape_markdown(text: str) -> str:
    """Plain text on one line, shown by Markdown as it is, in a cell of a table too."""
    line = " ".join(text.split())
    line = re.sub(r"([\\`*\[\]|~$])", r"\\\1", line)
    line = re.sub(r"(?<![A-Za-z0-9])_", r"\\_", line)  # d_ff needs none
    line = re.sub(r"&(?=#?\w+;)", "&amp;", line)  # alone, it means nothing
    return line.replace("<", "&lt;").replace(">", "&gt;")


def _line(text: str) -> str:
    """The same where a line begins: there `-`, `#` and `1.` would begin a list or a heading."""
    line = re.sub(r"^([-+#=])(?=[-+#=]*(\s|$))", r"\\\1", escape_markdown(text))
    return re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)


def _markdown(block: Block) -> str:
    match block:
        case Heading(text):
            return f"## {escape_markdown(text)}"
        case Paragraph(text, notice):
            return f"> {_line(text)}" if notice else _line(text)
        case Bullets(items):
            return "\n".join(f"* {_line(item)}" for item in items)
        case Code(text):
            fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
            return f"{fence}\n{text}\n{fence}"
        case Table(head, rows, caption, text_columns):
            rule = [":--" if n < text_columns else "--:" for n in range(len(head))]
            cells = [head, rule, *rows]
            lines = [
                "| " + " | ".join(map(str if row is rule else escape_markdown, row)) + " |"
                for row in cells
            ]
            return "\n".join([_line(caption), "", *lines] if caption else lines)
        case Picture(name, caption):
            return f"![{name.replace('_', ' ')}]({name}.png)\n\n{_line(caption)}"


def to_html(title: str, blocks: Sequence[Block], pictures: Mapping[str, str]) -> str:
    """The text as one page that needs no other file.

    Args:
        title: also of the window.
        blocks: in the order of the page.
        pictures: each picture's SVG, black on white, by its name.
    """
    body = "\n".join(_html(block, pictures) for block in blocks)
    name = html.escape(" ".join(title.split()))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{name}</h1>\n{body}\n</body>\n</html>\n"
    )


def _html(block: Block, pictures: Mapping[str, str]) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Paragraph(text, notice):
            kind = ' class="notice"' if notice else ""
            return f"<p{kind}>{html.escape(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Table(head, rows, caption, text_columns):
            title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
            lines = [_row("th", head, text_columns), *(_row("td", r, text_columns) for r in rows)]
            return "\n".join([f'<div class="wide"><table>{title}', *lines, "</table></div>"])
        case Picture(name, caption):
            drawing = _inline(pictures[name])
            return f"<figure>{drawing}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _row(tag: str, cells: Sequence[str], text_columns: int) -> str:
    kinds = [' class="text"' if n < text_columns else "" for n in range(len(cells))]
    filled = zip(kinds, cells, strict=True)
    return "<tr>" + "".join(f"<{tag}{k}>{html.escape(c)}</{tag}>" for k, c in filled) + "</tr>"


def _inline(svg: str) -> str:
    """An SVG file as a part of a page: its black is the page's ink, its white the page's ground."""
    drawing = svg[svg.index("<svg") :]
    drawing = re.sub(r'<g id="[^"]*">', "<g>", drawing)  # of every picture the same
    return drawing.replace("#000000", "currentColor").replace("#ffffff", "var(--page)")
