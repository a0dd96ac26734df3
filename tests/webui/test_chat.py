"""Conversations on the page: what is sent for each turn, Markdown, and what a browser keeps of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.webui.conftest import Site, browsing, ready, served, show_calls

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
CHAT = tiny.YAML.replace("task: text-generation", "task: chat-completion").replace(
    "text: ${input.prompt as text}", "messages: ${input.messages}"
)


@pytest.fixture(scope="module")
def chat_site(folder: Path) -> Iterator[Site]:
    path = folder / "chat.yml"
    path.write_text(CHAT, encoding="utf-8")
    with served(path) as opened:
        yield opened


@pytest.fixture
def page(browser: Any, chat_site: Site) -> Iterator[Any]:
    with browsing(browser, chat_site.page) as opened:
        ready(opened)
        yield opened


def box(page: Any) -> Any:
    return page.get_by_role("textbox", name="messages")


def send(page: Any, text: str, *, turns: int) -> str:
    """Sends a message. Returns the answer, which is the last of so many."""
    box(page).fill(text)
    box(page).press("Enter")
    expect(page.locator(".chat .run.done")).to_have_count(turns)
    return str(page.locator(".chat .run.done .text").last.text_content())


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_each_turn_sends_the_whole_conversation(page: Any, chat_site: Site) -> None:
    page.get_by_role("textbox", name="System prompt").fill("Rhyme.")
    send(page, "What is a haiku?", turns=1)
    first = chat_site.answer({"messages": [turn("system", "Rhyme."), turn("user", "What is a haiku?")]})["generated"]
    page.get_by_role("combobox", name="Blend").select_option("strong · alpaca 2")
    send(page, "Another", turns=2)
    curl = show_calls(page)[0]
    said = '{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "What is a haiku?"}'
    assert said in curl
    assert curl.count('"role": "assistant"') == 1
    facts = page.locator(".chat .facts").all_text_contents()
    assert ["(default)" in facts[0], "(strong)" in facts[1]] == [True, True]  # each answer keeps its figures
    page.get_by_text("Do this by API").click()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".chat .run.done")).to_have_count(2)
    expect(page.locator(".turn.user .text")).to_have_text(["What is a haiku?", "Another"])
    assert first


def test_a_message_is_sent_by_enter_and_broken_by_shift_enter(page: Any) -> None:
    box(page).fill("One")
    box(page).press("Shift+Enter")
    box(page).press_sequentially("Two")
    assert box(page).input_value() == "One\nTwo"
    box(page).dispatch_event("keydown", {"key": "Enter", "isComposing": True})  # the end of a Chinese word
    assert box(page).input_value() == "One\nTwo"
    box(page).press("Control+Enter")
    expect(page.locator(".turn.user .text")).to_have_text("One\nTwo")
    expect(page.locator(".chat .run.done")).to_have_count(1)


def test_a_conversation_is_pasted_as_json_and_a_mistake_in_it_is_told(page: Any) -> None:
    box(page).fill('[{"role": "user", "content": "What is a haiku?"}')
    box(page).press("Enter")
    expected = 'messages: expected a list of messages, such as [{"role": "user", "content": "Hello"}]'
    expect(page.locator(".composer [role=alert]")).to_have_text(expected)
    assert box(page).input_value().startswith("[{")  # to mend it
    expect(page.locator(".turn")).to_have_count(0)
    send(page, '[{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "What is a haiku?"}]', turns=1)
    assert page.get_by_role("textbox", name="System prompt").input_value() == "Rhyme."
    expect(page.locator(".turn.user .text")).to_have_text("What is a haiku?")
    assert '[{"role": "system", "content": "Rhyme."}, {"role": "user"' in show_calls(page)[0]


def test_an_empty_message_is_told(page: Any) -> None:
    box(page).press("Enter")
    expect(page.locator(".composer [role=alert]")).to_have_text("type a message")


def test_conversations_survive_a_reload_and_go_on(page: Any) -> None:
    send(page, "One", turns=1)
    answer = send(page, "Two", turns=2)
    page.reload()
    cards = page.locator(".earlier .run")
    expect(cards).to_have_count(1)  # both turns are one conversation
    expect(cards.locator(".question")).to_have_text("Two")
    ready(page)
    page.get_by_role("button", name="Continue").click()
    expect(cards).to_have_count(0)
    expect(page.locator(".turn.user .text")).to_have_text(["One", "Two"])
    assert page.locator(".chat .run .text").last.text_content() == answer
    box(page).fill("Three")
    box(page).press("Enter")
    expect(page.locator(".turn.user .text")).to_have_text(["One", "Two", "Three"])
    expect(page.get_by_role("button", name="Try again")).to_have_count(1)
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    expect(cards.locator(".question")).to_have_text("Three")


def test_on_a_phone_the_settings_stand_between_the_conversation_and_earlier_chats(page: Any) -> None:
    page.set_viewport_size({"width": 420, "height": 900})
    send(page, "One", turns=1)
    page.get_by_role("button", name="New chat").click()
    parts = [".chat", ".mixer", ".sampling", ".earlier h2"]
    tops = [page.locator(f"{part}:visible").bounding_box()["y"] for part in parts]
    assert tops == sorted(tops)


def test_a_link_brings_a_conversation_back(page: Any, chat_site: Site) -> None:
    messages = '[{"role":"user","content":"One"},{"role":"assistant","content":"1"},{"role":"user","content":"Two"}]'
    page.goto(f"{chat_site.page}#input.messages={messages}&blend=strong")
    expect(page.locator(".turn .text")).to_have_text(["One", "1"])
    assert box(page).input_value() == "Two"
    page.goto(f"{chat_site.page}#input.messages=Hello")
    expect(page.locator(".turn")).to_have_count(0)
    assert box(page).input_value() == "Hello"


MARKDOWN = """\
# Fruit

1. *Apple*
2. **Pear**

| a | b |
|---|---|
| 1 | 2 |

```python
print("<b>")
```

<script>alert(1)</script> <b>bold</b> <img src="http://evil.example/x.png" onerror="alert(1)">
![picture](http://evil.example/y.png) [link](http://127.0.0.1/z) [bad](javascript:alert(1))
"""


def test_markdown_is_drawn_and_brings_nothing_of_its_own(page: Any) -> None:
    drawn = page.evaluate(
        """async (text) => {
            const { markdown } = await import("/assets/markdown.js");
            const holder = document.createElement("div");
            holder.append(markdown(text));
            document.body.append(holder);
            return holder.innerHTML;
        }""",
        MARKDOWN,
    )
    for part in ("<h1>Fruit</h1>", "<em>Apple</em>", "<strong>Pear</strong>", "<td>1</td>", 'print("&lt;b&gt;")'):
        assert part in drawn
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &lt;b&gt;bold&lt;/b&gt;" in drawn  # HTML is text
    assert '<a href="http://127.0.0.1/z" target="_blank" rel="noopener noreferrer">link</a>' in drawn
    assert ">bad</a>" in drawn
    for tag in ("<script", "<img", "<b>", "javascript:"):
        assert tag not in drawn


def test_a_chat_model_without_a_conversation_field_answers_in_markdown(browser: Any, folder: Path) -> None:
    path = folder / "form.yml"
    asked = "messages: [{role: user, content: '${input.question as text}'}]"
    path.write_text(CHAT.replace("messages: ${input.messages}", asked), encoding="utf-8")
    with served(path) as site, browsing(browser, site.page) as page:
        page.get_by_role("textbox", name="question").fill("What is a haiku?")
        page.get_by_role("button", name="Run", exact=True).click()
        expect(page.locator(".stage .done .markdown")).to_have_count(1)
