"""The parts of a self-contained page: nothing is loaded from anywhere, it follows the reader's light or dark mode, fits
a phone and prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from genrec.pages.style import CSS


def page(title: str, sections: Iterable[str]) -> str:
    """The whole page; sections that are empty are left out."""
    return _PAGE.format(title=escape(title), css=CSS, body="\n".join(filter(None, sections)))


def section(title: str, *cards: str, layout: str = "grid") -> str:
    if not any(cards):
        return ""
    return f'<section><h2>{escape(title)}</h2><div class="{layout}">{"".join(cards)}</div></section>'


def card(title: str, drawing: str, note: str = "", wide: bool = False) -> str:
    if not drawing:
        return ""
    below = f"<p class=note>{escape(note)}</p>" if note else ""
    return f"<figure class='card{' wide' * wide}'><h3>{escape(title)}</h3>{drawing}{below}</figure>"


def facts(groups: Mapping[str, Mapping[str, str]]) -> list[str]:
    return [
        f'<div class="card"><h3>{escape(group)}</h3><dl>'
        + "".join(f"<dt>{escape(what)}</dt><dd>{escape(str(value))}</dd>" for what, value in entries.items())
        + "</dl></div>"
        for group, entries in groups.items()
        if entries
    ]


def command_card(commands: Sequence[str]) -> str:
    if not commands:
        return ""
    return f'<div class="card wide"><h3>Commands</h3><pre>{escape(chr(10).join(commands))}</pre></div>'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
