"""Checks the links of every Markdown file: `python -m docs.links`. Prints the addresses outside, which nobody fetches.

Sphinx checks the pages under docs/ while it builds them; this also reads README, ARCHITECTURE, the examples and more.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = re.compile(r"[a-z]+:", re.IGNORECASE)


def documents() -> list[Path]:
    """Every Markdown file of the project, those in hidden and generated folders apart."""
    return sorted(
        path
        for path in ROOT.rglob("*.md")
        if not any(part.startswith((".", "_")) or part in ("build", "dist") for part in path.relative_to(ROOT).parts)
    )


@cache
def tokens(path: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))


def links(path: Path) -> Iterator[tuple[int, str]]:
    """Line and target of each link and image."""
    for token in tokens(path):
        for inner in token.children or ():
            target = inner.attrGet("href") or inner.attrGet("src")
            if target:
                yield (token.map or [0])[0] + 1, str(target)


@cache
def anchors(path: Path) -> set[str]:
    """The anchors of the headings, as GitHub and MyST make them."""
    found: list[str] = []
    parts = tokens(path)
    for opening, inline in pairwise(parts):
        if opening.type == "heading_open":
            text = "".join(child.content for child in inline.children or ())
            found.append(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-"))
    return {name if not (before := found[:at].count(name)) else f"{name}-{before}" for at, name in enumerate(found)}


def problems(paths: Iterable[Path]) -> Iterator[str]:
    """Each link that leads nowhere, with its place."""
    for path in paths:
        for line, target in links(path):
            if OUTSIDE.match(target):
                continue
            file, _, anchor = target.partition("#")
            goal = (path.parent / file).resolve() if file else path
            if not goal.exists():
                yield f"{path.relative_to(ROOT)}:{line}: {target}: there is no such file"
            elif anchor and anchor not in anchors(goal):
                yield f"{path.relative_to(ROOT)}:{line}: {target}: {goal.name} has no such heading"


def main() -> None:
    paths = documents()
    for address in sorted({target for path in paths for _, target in links(path) if OUTSIDE.match(target)}):
        print(address)
    if found := list(problems(paths)):
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
