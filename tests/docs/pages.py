"""The project's Markdown pages: their headings, links, tables and code blocks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "examples/README.md", *sorted(DOCS.rglob("*.md"))]

FILE_NAME = re.compile(r"`([\w./-]+)`:")
FIRST_CELL = re.compile(r"^\| `((?:[^`])+)`", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: `mark` is the comment above it, `file` the name in the line above it."""

    language: str
    text: str
    line: int
    mark: str
    file: str


def name(page: Path) -> str:
    """The page as the repository calls it."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found, before = [], ""
    for token in _tokens(page):
        if token.type == "fence":
            mark = re.fullmatch(r"<!-- (.*) -->", before)
            file = FILE_NAME.fullmatch(before)
            found.append(
                Block(
                    token.info,
                    token.content,
                    token.map[0] + 1 if token.map else 0,
                    mark[1] if mark else "",
                    file[1] if file else "",
                )
            )
        if token.content:
            before = token.content.strip()
    return found


def anchors(page: Path) -> set[str]:
    """What a link may name after `#`: each heading, as GitHub spells it."""
    found = set()
    for before, token in _pairs(page):
        if before.type == "heading_open":
            text = re.sub(r"[^\w\- ]", "", token.content.lower())
            found.add(text.strip().replace(" ", "-"))
    return found


def links(page: Path) -> list[str]:
    """The targets of all links."""
    return [
        str(child.attrs["href"])
        for token in _tokens(page)
        for child in token.children or ()
        if child.type == "link_open"
    ]


def section(page: Path, heading: str) -> str:
    """The text between a heading and the next one of the same or a higher level."""
    text = page.read_text(encoding="utf-8")
    found = re.search(rf"^(#+) {re.escape(heading)}$", text, re.MULTILINE)
    assert found, f"{name(page)} has no heading {heading!r}"
    rest = text[found.end() :]
    stop = re.search(rf"^#{{1,{len(found[1])}}} ", rest, re.MULTILINE)
    return rest[: stop.start()] if stop else rest


def first_cells(text: str) -> list[str]:
    """The code in the first cell of each row of the tables."""
    return [cell.replace(r"\|", "|") for cell in FIRST_CELL.findall(text)]


def _tokens(page: Path) -> list[Token]:
    parser = MarkdownIt("commonmark").enable("table")
    return parser.parse(page.read_text(encoding="utf-8"))


def _pairs(page: Path) -> Iterator[tuple[Token, Token]]:
    return itertools.pairwise(_tokens(page))
