"""A report in one HTML file: text, tables and pictures, all inside it; no script, nothing fetched from elsewhere."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

PAGE_DPI, FIGURE_DPI = 96, 160  # figures.style writes 160 pixels per inch
LARGE = 600_000  # bytes of a PNG, of many photographs, that is put into the page as JPEG
TYPES = {".png": "image/png", ".gif": "image/gif"}
CSS = """
:root { color-scheme: light; --ink: #1d2329; --soft: #5b6670; --line: #e3e6e9; --accent: #c2500a; --wash: #f6f7f8 }
* { box-sizing: border-box }
body { margin: 0; color: var(--ink); background: #fff; font: 17px/1.6 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", "Liberation Sans", Arial, sans-serif; -webkit-text-size-adjust: 100% }
header, main, footer { max-width: 58rem; margin: 0 auto; padding: 0 1.25rem }
header { padding-top: 3rem }
h1 { font-size: clamp(1.7rem, 4.5vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .6rem }
h2 { font-size: 1.4rem; line-height: 1.25; letter-spacing: -.01em; margin: 0 0 .6rem }
p { max-width: 46rem; margin: 0 0 .9rem }
.lead { color: var(--soft); font-size: 1.08rem }
section { padding: 2.2rem 0 1.2rem; border-top: 1px solid var(--line) }
nav { margin: 1.4rem 0 2.2rem; font-size: .93rem; columns: 16rem; column-gap: 2rem }
nav a { display: block; color: var(--accent); text-decoration: none; padding: .12rem 0 }
nav a:hover { text-decoration: underline }
.short { background: var(--wash); border-left: 4px solid var(--accent); border-radius: 0 6px 6px 0;
  padding: 1rem 1.3rem; margin: 1.4rem 0 }
.short ul { margin: 0; padding-left: 1.1rem } .short li { margin: .35rem 0 }
figure { margin: 1.1rem 0; overflow-x: auto; -webkit-overflow-scrolling: touch }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto }
@media (max-width: 40rem) { body { font-size: 16px } header { padding-top: 1.8rem }
  figure img.wide { max-width: none; width: 46rem } }
.table { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums }
th, td { padding: .38rem .9rem .38rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600; color: var(--soft) } th:first-child, td:first-child { text-align: left }
.facts td { text-align: left; white-space: normal } .facts td:first-child { color: var(--soft); white-space: nowrap }
.how { color: var(--soft); font-size: .95rem }
footer { color: var(--soft); font-size: .88rem; padding-top: 1.5rem; padding-bottom: 3rem }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; background: var(--wash); padding: .1em .3em;
  border-radius: 3px; overflow-wrap: anywhere }
"""


@dataclass(frozen=True)
class Table:
    """heads: one per column; rows of plain text. facts: names and values, without heads."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    facts: bool = False


@dataclass(frozen=True)
class Section:
    """One figure and its explanation. text: what one sees; how: definitions and how to read it; plain text both.

    pictures: files, and what a reader who cannot see them is told.
    """

    title: str
    text: Sequence[str]
    how: Sequence[str] = ()
    pictures: Sequence[tuple[Path, str]] = ()
    table: Table | None = None


def page(title: str, lead: str, facts: Table, short: Sequence[str], sections: Sequence[Section], foot: str) -> str:
    """The whole document. Everything given is plain text and is escaped."""
    links = "".join(f'<a href="#s{i}">{html.escape(section.title)}</a>' for i, section in enumerate(sections))
    points = "".join(f"<li>{html.escape(line)}</li>" for line in short)
    body = "".join(_section(number, section) for number, section in enumerate(sections))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style></head>\n<body><header><h1>{html.escape(title)}</h1>"
        f'<p class="lead">{html.escape(lead)}</p>{_table(facts)}'
        f'<div class="short"><ul>{points}</ul></div><nav>{links}</nav></header>\n'
        f"<main>{body}</main>\n<footer>{html.escape(foot)}</footer></body></html>\n"
    )


def _section(number: int, section: Section) -> str:
    parts = [f'<section id="s{number}"><h2>{html.escape(section.title)}</h2>']
    parts += [f"<p>{html.escape(text)}</p>" for text in section.text]
    parts += [_picture(path, words) for path, words in section.pictures]
    if section.table is not None:
        parts.append(_table(section.table))
    parts += [f'<p class="how">{html.escape(text)}</p>' for text in section.how]
    return "".join(parts) + "</section>\n"


def _picture(path: Path, words: str) -> str:
    """The picture, in the size in inches that it was drawn for; a wide one scrolls sideways on a phone."""
    with Image.open(path) as picture:
        width = picture.width if path.suffix == ".gif" else round(picture.width * PAGE_DPI / FIGURE_DPI)
    kind, content = TYPES[path.suffix], path.read_bytes()
    if path.suffix == ".png" and len(content) > LARGE:
        kind, content = "image/jpeg", _as_jpeg(path)
    data = base64.b64encode(content).decode("ascii")
    wide = ' class="wide"' if width > 700 else ""
    return (
        f'<figure><img{wide} width="{width}" alt="{html.escape(words, quote=True)}" '
        f'src="data:{kind};base64,{data}"></figure>'
    )


def _as_jpeg(path: Path) -> bytes:
    stream = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(stream, "JPEG", quality=82, optimize=True)
    return stream.getvalue()


def _table(table: Table) -> str:
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in table.heads)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    kind = ' class="facts"' if table.facts else ""
    top = f"<thead><tr>{heads}</tr></thead>" if table.heads else ""
    return f'<div class="table"><table{kind}>{top}<tbody>{rows}</tbody></table></div>'
