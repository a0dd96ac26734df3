"""Chat templates are programs of the base's author: whatever they fail with is told, and is no failure of the server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import tiny
from tests.conftest import serving

YAML = """\
component:
  type: model
  task: chat-completion
  model: ./base
  precision: float32
  action: {messages: "${input.messages}"}
"""
FAILURES = {
    "tools": ("{% for tool in tools %}{% endfor %}", "TypeError: 'NoneType' object is not iterable"),
    "division": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "value": ("{{ 'a'.index('b') }}", "ValueError: substring not found"),
    "key": ("{{ messages[0].popitem }}{{ {}['a']['b'] }}", "has no attribute 'a'"),
    "recursion": ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
    "endless": ("{% for each in range(10 ** 9) %}a{% endfor %}", "OverflowError: Range too big"),
    "huge": ("{{ 'a' * 10 ** 30 }}", "OverflowError"),
    "unsafe": ("{{ ''.__class__.mro() }}", "unsafe"),
    "own": ("{{ raise_exception('Conversation roles must alternate') }}", "Conversation roles must alternate"),
    "call": ("{{ messages[0].content() }}", "not callable"),
}
TEMPLATE = "".join(
    f"{{% {'el' if at else ''}if messages[0].content == '{name}' %}}{source}"
    for at, (name, (source, _)) in enumerate(FAILURES.items())
) + ("{% else %}{% for m in messages %}{{ m.name or '' }}{{ m.content }}{% endfor %}{% endif %}")  # fmt: skip


def served(folder: Path, template: Any) -> Path:
    base = tiny.save_base(folder / "base", chat=False)
    if isinstance(template, str):
        (base / "chat_template.jinja").write_text(template, encoding="utf-8")
    else:
        config = base / "tokenizer_config.json"
        named = [{"name": name, "template": source} for name, source in template.items()]
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": named}))
    path = folder / "model-compose.yml"
    path.write_text(YAML, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(served(tmp_path_factory.mktemp("templates"), TEMPLATE)) as url:
        yield url


def chat(url: str, content: str, **fields: Any) -> httpx.Response:
    body = {"model": "default", "messages": [{"role": "user", "content": content} | fields], "max_tokens": 1}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


@pytest.mark.parametrize("name", FAILURES)
def test_whatever_a_template_fails_with_is_a_400_that_says_it(failing: str, name: str) -> None:
    answer = chat(failing, name)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, "messages", "invalid_request_error")
    assert "chat template" in error["message"]
    assert FAILURES[name][1] in error["message"]
    run = httpx.post(
        f"{failing}/api/workflows/runs", json={"input": {"messages": [{"role": "user", "content": name}]}}, timeout=60
    )
    assert run.status_code == 400
    assert FAILURES[name][1] in run.json()["detail"]


def test_other_messages_are_answered_as_before(failing: str) -> None:
    assert chat(failing, "hello").json()["usage"]["prompt_tokens"] == len("hello")


def test_a_template_is_given_who_speaks(failing: str) -> None:
    assert chat(failing, "hello", name="Ann").json()["usage"]["prompt_tokens"] == len("Annhello")


def test_several_templates_without_a_default_are_a_400_that_names_them(tmp_path: Path) -> None:
    with serving(served(tmp_path, {"chatml": "{{ messages[0].content }}", "tool_use": ""})) as url:
        answer = chat(url, "hello")
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400
    assert "chatml, tool_use" in message
    assert "tokenizer_config.json" in message
    assert "`chat_template` argument" not in message  # transformers' advice to programmers


def test_one_of_several_templates_may_be_the_default(tmp_path: Path) -> None:
    with serving(served(tmp_path, {"default": "{{ messages[0].content }}!", "tool_use": ""})) as url:
        assert chat(url, "hello").json()["usage"]["prompt_tokens"] == len("hello!")
