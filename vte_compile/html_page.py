"""What all HTML pages share: one look, and parts that need no other file. Readable on a phone."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

_STYLE = """
:root { --ink: #1d2733; --muted: #5b6b7b; --line: #e3e8ee; --paper: #fff; --ground: #f5f7f9; --accent: #d9480f;
  --good: #2b8a3e; --bad: #c92a2a; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2rem 1rem 3rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p { margin: .5rem 0; max-width: 46rem; }
.muted { color: var(--muted); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem;
  margin-top: 1.5rem; }
.tile, .card, figure, .scroll { background: var(--paper); border: 1px solid var(--line); border-radius: .6rem; }
.tile { padding: .85rem 1rem; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { display: block; color: var(--muted); font-size: .85rem; line-height: 1.35; margin-top: .2rem; }
.tile.main b { color: var(--accent); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .75rem; }
@media (min-width: 50rem) { .cards { grid-template-columns: repeat(4, 1fr); } }
.card { overflow: hidden; display: flex; flex-direction: column; }
.card img { width: 100%; aspect-ratio: 1; object-fit: cover; display: block; background: #000; }
.card div { padding: .6rem .75rem .75rem; }
.card h3 { margin: 0 0 .5rem; font-size: 1rem; line-height: 1.35; }
.card small { color: var(--muted); font-weight: 400; display: block; }
dl { display: grid; grid-template-columns: auto 1fr; gap: .1rem .6rem; margin: 0; font-size: .875rem; }
dt { color: var(--muted); }
dd { margin: 0; }
.right::after { content: " \\2713"; color: var(--good); font-weight: 700; }
.wrong::after { content: " \\2717"; color: var(--bad); font-weight: 700; }
.strip { display: flex; gap: 3px; margin-top: .6rem; padding: 0; }
.card .strip { padding: 0; }
.strip i { flex: 1; height: .45rem; border-radius: 2px; background: var(--line); }
.strip i.seen { background: var(--accent); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: .75rem; }
figure { margin: 0; padding: .75rem; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: var(--muted); font-size: .85rem; line-height: 1.4; padding: .5rem .25rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 600; font-size: .8rem; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
tr:last-child td { border-bottom: 0; }
tr.learned td { font-weight: 650; background: #fff4ec; }
ul { padding-left: 1.2rem; margin: .5rem 0; max-width: 48rem; }
li { margin: .3rem 0; }
code { font-size: .85em; overflow-wrap: anywhere; }
"""


def document(title: str, body: str) -> str:
    """A whole page.

    Args:
        title: Of the window; text.
        body: HTML, from the heading on.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def tiles(found: Sequence[tuple[str, str]]) -> str:
    """Numbers as tiles, the first of them marked: a number as HTML, and as text what it is."""
    return "".join(
        f'<div class="tile{" main" if i == 0 else ""}"><b>{value}</b><span>{escape(text)}</span></div>'
        for i, (value, text) in enumerate(found)
    )


def figure(file: Path, caption: str) -> str:
    """A PNG file with a caption."""
    alt = escape(file.stem.replace("_", " "))
    return f'<figure><img src="{inline(file)}" alt="{alt}"><figcaption>{escape(caption)}</figcaption></figure>'


def table(head: Sequence[str], rows: Sequence[tuple[Sequence[str], str]]) -> str:
    """A table of text; each row has its cells and its CSS class."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        f'<tr class="{kind}">{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>' for cells, kind in rows
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def machine(environment: Mapping[str, Any]) -> str:
    """Versions, processors and commit, on one line, from what :func:`vte_compile.environment.environment` gives."""
    parts = [f"{name} {version}" for name, version in environment["versions"].items() if version]
    parts += [str(environment["cpu"]["name"]), f"{environment['cpu']['cores']} cores"]
    parts += [gpu["name"] for gpu in environment["gpus"]]
    if environment["commit"]:
        parts.append(f"commit {environment['commit'][:12]}")
    return " · ".join(parts)


def inline(file: Path) -> str:
    """A PNG file as the source of an image."""
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"
