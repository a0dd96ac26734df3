"""Runs as the page draws them: several models, empty texts, markup that is text."""

from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
DRAW = """async (run) => {
    const { endedRun } = await import("/assets/output.js");
    const holder = document.createElement("div");
    holder.append(...endedRun({ texts: {}, answers: [], notes: [], status: "done", seconds: 1.04, ...run }, false));
    return holder.innerHTML;
}"""


def answer(component: str, weights: dict[str, float], name: str | None, **blend: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "tokens_per_second": 7.25}
    used = {"name": name, "weights": weights, "identity": "0123456789abcdef", **blend}
    return {"component": component, "usage": usage, "blend": used}


def test_two_models_are_labelled_by_component(page: Any) -> None:
    answers = [answer("writer", {"alpaca": 1.5}, None), answer("editor", {"pirate": 2, "alpaca": 0}, "loud")]
    drawn = page.evaluate(DRAW, {"texts": {"draft": "a", "final": "b"}, "answers": answers})
    assert "<h3>draft</h3>" in drawn
    assert "<h3>final</h3>" in drawn
    figures = "<span>1 token</span><span>7.3 tok/s</span><span>1.0 s</span>"
    assert f"<span>writer</span><span>blend <b>alpaca 1.5 (custom)</b></span>{figures}" in drawn
    assert "<span>editor</span><span>blend <b>pirate 2 (loud)</b></span>" in drawn
    assert '<span>identity <code title="0123456789abcdef">01234567</code></span>' in drawn


@pytest.mark.parametrize(
    ("blend", "shown"),
    [
        (answer("", {"a": 1, "b": 0.5}, "merged", method="ties"), "a 1 · b 0.5 (merged, ties)"),
        (answer("", {"a": 0}, None), "bare base"),
        (answer("", {}, "plain"), "bare base (plain)"),
        (answer("", {"a": 0.7}, "default"), "a 0.7 (default)"),
    ],
)
def test_a_blend_is_told_in_words(page: Any, blend: dict[str, Any], shown: str) -> None:
    assert f"<b>{shown}</b>" in page.evaluate(DRAW, {"texts": {"": "x"}, "answers": [blend]})


def test_a_model_without_adapters_has_no_blend_to_tell(page: Any) -> None:
    assert "blend" not in page.evaluate(DRAW, {"texts": {"": "x"}, "answers": [answer("", {}, "default")]})


def test_an_empty_text_is_told_once(page: Any) -> None:
    """By the note, which says why; where there are several texts, each empty one is marked too."""
    note = "the text is empty: the model ended at once"
    alone = page.evaluate(DRAW, {"texts": {"": ""}, "notes": [note]})
    assert "empty text" not in alone
    assert '<p class="note">The text is empty: the model ended at once.</p>' in alone
    assert "empty text" in page.evaluate(DRAW, {"texts": {"": ""}})
    assert page.evaluate(DRAW, {"texts": {"a": "", "b": "x"}, "notes": [note]}).count("empty text") == 1


def test_text_is_never_markup(page: Any) -> None:
    run = {"texts": {"<i>": "<script>alert(1)</script>"}, "error": "<b>bad</b>", "notes": ["<u>"], "status": "failed"}
    drawn = page.evaluate(DRAW, run)
    assert not any(tag in drawn for tag in ("<script", "<b>", "<i>", "<u>"))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in drawn
