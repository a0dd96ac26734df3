"""The web page in a headless browser: what a person types, presses and reads, and that the calls it shows do the same."""

import asyncio
import json
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from model_compose.progress import Progress
from tests.waiting import held, wait_until
from tests.webui.conftest import CHAIN, YAML, Site, browsing, finished, run, served, show_calls

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect
LOCKED = YAML.replace("base_path: /api", 'base_path: /api, api_keys: ["${env.KEY}"]')
DEFAULT = "alpaca 0.7 · pirate 0.8 (default)"


def weight(page: Any, name: str) -> Any:
    """The box that holds an adapter's weight."""
    return page.get_by_role("spinbutton", name=f"{name} weight")


def picker(page: Any) -> Any:
    return page.get_by_role("combobox", name="Blend")


def picked(page: Any, label: str = "Blend") -> str:
    return str(page.get_by_role("combobox", name=label).locator("option:checked").text_content())


# Runs.


def test_a_run_shows_its_text_blend_speed_and_identity(page: Any, site: Site) -> None:
    expect(page.get_by_role("heading", name="Workshop")).to_be_visible()
    expect(page.get_by_role("tab")).to_have_text(["Short", "Long"])
    expect(page.get_by_text("A few words.")).to_be_visible()
    run(page, "Ahoy")
    assert finished(page, DEFAULT) == site.answer({"prompt": "Ahoy"})["generated"]
    facts = page.locator(".stage .facts").inner_text().split("\n")
    assert page.locator(".stage .note").inner_text() == "The text was cut at max_output_length (24 tokens)."
    assert facts[:2] == [f"blend {DEFAULT}", "24 tokens"]
    for pattern, fact in zip((r"[\d.]+ tok/s", r"[\d.]+ s", r"identity [0-9a-f]{8}"), facts[2:], strict=True):
        assert re.fullmatch(pattern, fact)
    expect(page.get_by_role("status").last).to_have_text("Finished. The text was cut at max_output_length (24 tokens).")


def test_text_appears_while_it_is_made(page: Any) -> None:
    page.get_by_role("tab", name="Long").click()
    run(page, "Ahoy")
    text = page.locator(".running .text")
    expect(text).not_to_be_empty()
    before = text.text_content()
    wait_until(lambda: len(text.text_content()) > len(before))
    page.get_by_role("button", name="Stop").click()


def test_ctrl_enter_runs_from_every_box_and_once(page: Any) -> None:
    page.get_by_role("tab", name="Long").click()
    box = page.get_by_role("textbox", name="prompt")
    box.fill("Ahoy")
    box.press("Enter")
    assert box.input_value() == "Ahoy\n"
    weight(page, "alpaca").press("Control+Enter")
    expect(page.locator(".running")).to_have_count(1)
    box.press("Control+Enter")  # it runs already
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_disabled()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".stopped")).to_have_count(1)


def test_stop_ends_the_computation_and_keeps_the_text(page: Any, site: Site) -> None:
    page.get_by_role("tab", name="Long").click()
    run(page, "Ahoy")
    expect(page.locator(".running .text")).not_to_be_empty()
    with held(site.compose.models["__component__"].engine):  # so that the run cannot end by itself
        assert site.compose.busy == 1
        page.get_by_role("button", name="Stop").click()
        wait_until(lambda: site.compose.busy == 0)
    stopped = page.locator(".stopped")
    stopped.wait_for()
    facts = stopped.locator(".facts").inner_text()
    assert re.fullmatch(r"stopped after [\d.]+ s\nblend alpaca 0.7 · pirate 0.8", facts)
    assert stopped.locator(".text").text_content()
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_enabled()


def test_closing_the_tab_ends_the_computation(browser: Any, site: Site) -> None:
    with ExitStack() as stack:
        with browsing(browser, site.page) as page:
            page.get_by_role("tab", name="Long").click()
            run(page, "Ahoy")
            expect(page.locator(".running .text")).not_to_be_empty()
            stack.enter_context(held(site.compose.models["__component__"].engine))
            assert site.compose.busy == 1
        wait_until(lambda: site.compose.busy == 0)


def test_two_tabs_do_not_disturb_each_other(page: Any, site: Site) -> None:
    other = page.context.new_page()
    other.goto(site.page)
    for each in (page, other):
        each.get_by_role("tab", name="Long").click()
        run(each, "Ahoy")
        expect(each.locator(".running .text")).not_to_be_empty()
    assert site.compose.busy == 2
    page.get_by_role("button", name="Stop").click()
    wait_until(lambda: site.compose.busy == 1)
    text = other.locator(".running .text")
    before = text.text_content()
    wait_until(lambda: len(text.text_content()) > len(before))
    other.get_by_role("button", name="Stop").click()
    wait_until(lambda: site.compose.busy == 0)
    expect(page.locator(".earlier .run")).to_have_count(1)  # both tabs keep their runs in one place


def test_the_calls_shown_do_what_the_page_did(page: Any) -> None:
    weight(page, "pirate").fill("-0.5")
    page.get_by_role("spinbutton", name="Max tokens").fill("30")
    run(page, 'It\'s "so" $HOME\nand ünïcode')
    text = finished(page, "alpaca 0.7 · pirate -0.5 (custom)")
    curl, python, yaml = show_calls(page)
    answer = json.loads(subprocess.check_output(["bash", "-c", curl.replace("curl ", "curl -sS ", 1)]))
    assert answer["output"] == {"generated": text}
    assert answer["blend"]["weights"] == {"alpaca": 0.7, "pirate": -0.5}
    assert subprocess.check_output([sys.executable, "-c", python]).decode() == f"{text}\n"
    assert yaml == "blends:\n  my-blend: {alpaca: 0.7, pirate: -0.5}\n"


# Blends.


def test_the_base_and_the_adapters_say_what_they_are(page: Any) -> None:
    expect(page.locator(".mixer:visible .what")).to_have_text(
        [
            "base./base · float32 · huggingface",
            "alpacarank 4 · 0.7 in the file · ./alpaca",
            "piraterank 2 · 0.8 in the file · ./pirate",
        ]
    )


def test_the_picker_shows_the_weights_of_each_blend(page: Any) -> None:
    expect(picker(page).locator("option")).to_have_text(
        [
            "Default · alpaca 0.7 · pirate 0.8", "strong · alpaca 2", "merged (ties) · alpaca 2", "alpaca alone",
            "pirate alone", "Bare base", "Custom",
        ]
    )  # fmt: skip


def test_sliders_and_numbers_change_the_blend_and_earlier_texts_stay(page: Any) -> None:
    run(page, "Ahoy")
    first = finished(page, DEFAULT)
    page.get_by_role("slider", name="alpaca").fill("1.5")
    assert weight(page, "alpaca").input_value() == "1.5"
    assert picked(page) == "Custom"
    run(page, "Ahoy")
    second = finished(page, "alpaca 1.5 · pirate 0.8 (custom)")
    weight(page, "pirate").fill("-3.25")
    run(page, "Ahoy")
    third = finished(page, "alpaca 1.5 · pirate -3.25 (custom)")
    assert len({first, second, third}) == 3
    cards = page.locator(".earlier .text")
    expect(cards).to_have_count(2)
    assert cards.all_text_contents() == [second, first]


def test_a_weight_beyond_the_slider_is_told_and_a_wider_slider_reaches_it(page: Any) -> None:
    slider, told = page.get_by_role("slider", name="pirate"), page.locator(".beyond:visible")
    weight(page, "pirate").fill("-1.5")
    assert slider.input_value() == "0"
    assert told.inner_text() == "-1.5 is beyond this slider; the number counts."
    assert slider.get_attribute("aria-valuetext") == "-1.5, beyond the slider"
    page.get_by_role("combobox", name="Sliders reach").select_option("−2 to 4")
    assert slider.input_value() == "-1.5"
    expect(told).to_have_count(0)
    slider.fill("3.5")
    assert weight(page, "pirate").input_value() == "3.5"
    page.get_by_role("combobox", name="Sliders reach").select_option("0 to 2")
    assert weight(page, "pirate").input_value() == "3.5"
    run(page, "Ahoy")
    finished(page, "alpaca 0.7 · pirate 3.5 (custom)")


def test_the_picker_sets_the_sliders(page: Any) -> None:
    def weights() -> list[str]:
        return [weight(page, name).input_value() for name in ("alpaca", "pirate")]

    picker(page).select_option("strong · alpaca 2")
    assert weights() == ["2", "0"]
    assert page.get_by_role("slider", name="alpaca").input_value() == "2"
    run(page, "Ahoy")
    finished(page, "alpaca 2 (strong)")
    picker(page).select_option("merged (ties) · alpaca 2")  # other text under the same numbers
    run(page, "Ahoy")
    finished(page, "alpaca 2 (merged, ties)")
    weight(page, "alpaca").fill("1.9")
    weight(page, "alpaca").fill("2")  # typed weights are their sum
    assert picked(page) == "strong · alpaca 2"
    picker(page).select_option("merged (ties) · alpaca 2")
    assert picked(page) == "merged (ties) · alpaca 2"
    picker(page).select_option("Bare base")
    assert weights() == ["0", "0"]
    run(page, "Ahoy")
    finished(page, "bare base")
    weight(page, "alpaca").fill("0.7")
    weight(page, "pirate").fill("0.8")  # moved back by hand: the picker says what it is
    assert picked(page) == "Default · alpaca 0.7 · pirate 0.8"


def test_tab_through_the_picker_covers_nothing(page: Any) -> None:
    picker(page).focus()
    page.keyboard.press("Tab")
    slider = page.get_by_role("slider", name="alpaca")
    expect(slider).to_be_focused()
    slider.click(trial=True)  # playwright refuses where another element would get the click
    page.keyboard.press("ArrowRight")
    assert weight(page, "alpaca").input_value() == "0.75"


def test_adapters_that_were_loaded_meanwhile_have_sliders(browser: Any, folder: Path) -> None:
    path = folder / "runtime.yml"
    path.write_text(YAML.replace("  blends:\n", "  allow_runtime_adapters: true\n  blends:\n"), encoding="utf-8")
    with served(path) as site, browsing(browser, site.page) as page:
        weight(page, "alpaca").wait_for()
        expect(weight(page, "third")).to_have_count(0)
        body = {"lora_name": "third", "lora_path": "./pirate"}
        assert httpx.post(f"{site.api}/v1/load_lora_adapter", json=body, timeout=30).status_code == 200
        page.reload()
        weight(page, "third").fill("1.5")
        what = page.locator(".weight:visible .what", has_text="third").inner_text()
        assert re.fullmatch(r"third\nrank 2 · loaded by a client · .*/pirate", what)
        run(page, "Ahoy")
        finished(page, "alpaca 0.7 · pirate 0.8 · third 1.5")


# Sampling.


def test_temperature_length_and_seed_reach_the_engine(page: Any, site: Site) -> None:
    boxes = [page.get_by_role("spinbutton", name=name) for name in ("Temperature", "Max tokens", "Seed")]
    assert [box.get_attribute("placeholder") for box in boxes] == ["0", "24", "random"]  # as the file says
    for box, value in zip(boxes, ("1.5", "40", "7"), strict=True):
        box.fill(value)
    run(page, "Ahoy")
    expect(page.locator(".stage .done .facts")).to_contain_text("40 tokens")
    text = finished(page, DEFAULT)
    asked = {"model": "default", "prompt": "Tell: Ahoy", "temperature": 1.5, "max_tokens": 40, "seed": 7}
    client = httpx.post(f"{site.api}/v1/completions", json=asked, timeout=60).json()
    assert text == client["choices"][0]["text"]  # the same seed draws the same
    assert text != site.answer({"prompt": "Ahoy"})["generated"]
    curl, python = show_calls(page)
    answer = json.loads(subprocess.check_output(["bash", "-c", curl.replace("curl ", "curl -sS ", 1)]))
    assert answer["output"] == {"generated": text}
    assert subprocess.check_output([sys.executable, "-c", python]).decode() == f"{text}\n"


@pytest.mark.parametrize(
    ("name", "typed", "told"),
    [
        ("Max tokens", "0", "Max tokens must be a whole number of at least 1"),
        ("Max tokens", "2.5", "Max tokens must be a whole number of at least 1"),
        ("Temperature", "-1", "Temperature must be a number of at least 0"),
        ("Seed", "9223372036854775808", "Seed must be a whole number from 0 to 9223372036854775807"),
    ],
)
def test_a_wrong_number_is_told_at_its_box_and_not_sent(page: Any, name: str, typed: str, told: str) -> None:
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if request.method == "POST" else None)
    box = page.get_by_role("spinbutton", name=name)
    box.fill(typed)
    run(page, "Ahoy")
    expect(page.locator(".sampling:visible").get_by_role("alert")).to_have_text(told)
    assert box.get_attribute("aria-invalid") == "true"
    expect(box).to_be_focused()
    assert sent == []
    box.fill("9" if name == "Seed" else "1")
    run(page, "Ahoy")
    finished(page, DEFAULT)
    assert len(sent) == 1


# Errors.


def test_errors_are_sentences_beside_their_field(page: Any) -> None:
    box = page.get_by_role("textbox", name="prompt")
    run(page, "  ")
    error = page.locator("[data-field=prompt]:visible").get_by_role("alert")
    expect(error).to_have_text("prompt is required")
    expect(box).to_be_focused()
    assert box.get_attribute("aria-describedby") == error.get_attribute("id")
    expect(page.locator(".idle:visible")).to_have_count(1)
    box.press_sequentially("A")
    expect(error).to_have_count(0)
    weight(page, "alpaca").fill("")
    run(page, "Ahoy")
    error = page.locator("[data-field='blend.alpaca']:visible").get_by_role("alert")
    expect(error).to_have_text("the weight of alpaca is empty; type a number, 0 leaves the adapter out")
    expect(weight(page, "alpaca")).to_be_focused()
    assert "Traceback" not in page.content()


def test_an_error_of_the_run_keeps_the_text_before_it(page: Any, site: Site) -> None:
    run(page, "Ahoy")
    text = finished(page, DEFAULT)
    site.compose.ready = False
    try:
        page.get_by_role("button", name="Run", exact=True).click()
        alert = page.locator(".told:visible > [role=alert]")
        expect(alert).to_contain_text("the models are still loading, or the service is shutting down")
    finally:
        site.compose.ready = True
    assert finished(page, DEFAULT) == text


def test_a_server_that_is_gone_is_told(browser: Any, folder: Path) -> None:
    with served(folder / "model-compose.yml") as site, browsing(browser, site.page) as page:
        page.get_by_role("tab", name="Long").click()
        run(page, "Ahoy")
        expect(page.locator(".running .text")).not_to_be_empty()
        page.route("**/runs", lambda route: route.abort())
        page.get_by_role("button", name="Stop").click()
        run(page, "Ahoy")
        expect(page.get_by_text("The server does not answer; is it still up?")).to_be_visible()
        expect(page.locator(".stopped .text:visible")).to_have_count(1)


def test_a_chain_of_models_has_a_mixer_for_each(browser: Any, folder: Path) -> None:
    path = folder / "chain.yml"
    path.write_text(CHAIN, encoding="utf-8")
    with served(path) as site, browsing(browser, site.page) as page:
        button = page.get_by_role("button", name="Run", exact=True)
        expect(button).to_be_enabled()
        button.click()
        alerts = page.get_by_role("alert").filter(visible=True)
        expect(alerts).to_have_text(["prompt is required", "how.hints is required"])
        expect(page.get_by_role("textbox", name="prompt")).to_be_focused()  # the first that is wrong
        page.get_by_role("textbox", name="prompt").fill("Ahoy")
        page.get_by_role("textbox", name="how.hints").fill('"be brief"')
        page.get_by_role("spinbutton", name="length").fill("7")
        weight(page, "alpaca").fill("1.5")
        button.click()
        facts = page.locator(".stage .done .facts")
        expect(facts).to_have_text(
            [re.compile("^writerblend alpaca 1.5 .custom."), re.compile("^editorblend pirate 2 ")]
        )
        expect(page.locator(".stage h3")).to_have_text(["draft", "final"])
        (curl,) = show_calls(page)
        assert '"blend": {"writer": {"alpaca": 1.5}, "editor": "loud"}' in curl
        assert '"length": 7' in curl
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.locator(".stage").get_by_role("button", name="Copy link").click()
        page.goto(page.evaluate("navigator.clipboard.readText()"))
        page.reload()
        expect(weight(page, "alpaca")).to_have_value("1.5")
        assert [weight(page, "pirate").input_value(), picked(page, "Blend of editor")] == ["2", "Default · pirate 2"]


# What a browser keeps.


def test_earlier_runs_survive_a_reload_and_their_weights_come_back(page: Any) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    weight(page, "pirate").fill("-3.25")
    page.get_by_role("spinbutton", name="Max tokens").fill("25")
    run(page, "Ahoy")
    text = finished(page, "alpaca 0.7 · pirate -3.25 (custom)")
    page.reload()
    card = page.locator(".earlier .run")
    expect(card.locator(".text")).to_have_text(text)
    expect(card.locator(".question")).to_have_text("Ahoy")
    assert weight(page, "pirate").input_value() == "0.8"
    page.get_by_role("textbox", name="prompt").fill("Another")
    card.get_by_role("button", name="Use these weights").click()
    assert weight(page, "pirate").input_value() == "-3.25"
    assert page.get_by_role("spinbutton", name="Max tokens").input_value() == "25"
    assert page.get_by_role("textbox", name="prompt").input_value() == "Another"
    card.get_by_role("button", name="Copy", exact=True).click()
    expect(card.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == text
    page.get_by_role("button", name="Clear").click()
    expect(card).to_have_count(0)
    page.reload()
    picker(page).wait_for()
    expect(card).to_have_count(0)


def test_the_line_under_an_earlier_text_stands_outside_of_what_scrolls(page: Any) -> None:
    run(page, "Ahoy")
    finished(page, DEFAULT)
    page.reload()
    card = page.locator(".earlier .run")
    expect(card.locator(".facts")).to_contain_text(f"blend {DEFAULT}")
    expect(card.locator(".scrolled .text")).to_have_count(1)
    expect(card.locator(".scrolled .facts")).to_have_count(0)


def test_a_run_shows_the_sampling_that_differs_from_the_file(page: Any) -> None:
    for name, value in (("Temperature", "99"), ("Max tokens", "24"), ("Seed", "7")):  # 24 as in the file
        page.get_by_role("spinbutton", name=name).fill(value)
    run(page, "Ahoy")
    finished(page, DEFAULT)
    expect(page.locator(".stage .facts span").nth(1)).to_have_text("temperature 99 · seed 7")
    page.get_by_role("tab", name="Long").click()
    page.get_by_role("spinbutton", name="Seed").fill("8")
    run(page, "Ahoy")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".stopped:visible .facts span").last).to_have_text("seed 8")


def test_the_history_of_a_browser_is_bounded(page: Any) -> None:
    kept = page.evaluate(
        """async () => {
            const { history } = await import("/assets/history.js");
            const kept = history("w");
            for (let at = 0; at < 130; at++) kept.save({ id: `${at}`, texts: { "": "x" } });
            kept.save({ id: "129", texts: { "": "again" } });
            const small = kept.all();
            kept.save({ id: "large", texts: { "": "x".repeat(1_900_000) } });
            kept.save({ id: "larger", texts: { "": "x".repeat(1_900_000) } });
            return [small.length, small[0].texts[""], small[1].id, kept.all().map((run) => run.id)];
        }"""
    )
    assert kept == [100, "again", "128", ["larger"]]


def test_a_link_brings_back_workflow_prompt_blend_and_sampling(page: Any, site: Site) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    weight(page, "pirate").fill("-3.25")
    page.get_by_role("spinbutton", name="Seed").fill("7")
    run(page, 'A "prompt" & more\n+ ünïcode')
    finished(page, "alpaca 0.7 · pirate -3.25 (custom)")
    page.locator(".stage").get_by_role("button", name="Copy link").click()
    link = page.evaluate("navigator.clipboard.readText()")
    other = page.context.browser.new_page()
    other.goto(link)
    assert other.get_by_role("textbox", name="prompt").input_value() == 'A "prompt" & more\n+ ünïcode'
    assert [weight(other, name).input_value() for name in ("alpaca", "pirate")] == ["0.7", "-3.25"]
    assert other.get_by_role("spinbutton", name="Seed").input_value() == "7"
    assert site.compose.busy == 0  # a link runs nothing by itself
    other.goto(f"{site.page}#workflow=long&prompt=Ahoy&blend=merged")
    expect(other.get_by_role("tab", name="Long")).to_have_attribute("aria-selected", "true")
    assert other.get_by_role("textbox", name="prompt").input_value() == "Ahoy"
    assert picked(other) == "merged (ties) · alpaca 2"
    other.goto(f"{site.page}#blend=" + '{"alpaca":1.25,"gone":2}')
    gone = "The link gives a weight to 'gone', which this file does not have; that weight is left out."
    expect(other.get_by_role("alert")).to_have_text(gone)
    assert [weight(other, name).input_value() for name in ("alpaca", "pirate")] == ["1.25", "0"]
    other.close()


@pytest.mark.parametrize(
    ("fragment", "told"),
    [
        ("blend=nosuch", "names a blend 'nosuch' that this file does not have; the default blend is set"),
        ("blend=5", "says blend=5, which is neither a name nor weights of adapters; the default blend is set"),
        (
            'blend={"alpaca": "hot"}',
            'says that the weight of alpaca is "hot", which is not a number; the default blend is set',
        ),
        (
            "temperature=hot",
            "says temperature=hot, but Temperature must be a number of at least 0; the file's value is kept",
        ),
        ("colour=red", "says colour=red, but this form has no such field"),
        ("workflow=gone", "names a workflow 'gone' that this page does not have; the first workflow is shown"),
    ],
)
def test_what_a_link_says_and_the_page_cannot_set_is_told(page: Any, site: Site, fragment: str, told: str) -> None:
    picker(page).select_option("strong · alpaca 2")
    page.goto(f"{site.page}#blend=null&{fragment}")
    expect(page.get_by_role("alert").filter(visible=True)).to_have_text(f"The link {told}.")
    assert picked(page) == "Default · alpaca 0.7 · pirate 0.8"
    assert page.get_by_role("spinbutton", name="Temperature").input_value() == ""


def test_runs_can_be_saved_as_json_and_markdown(page: Any) -> None:
    run(page, "Ahoy")
    first = finished(page, DEFAULT)
    picker(page).select_option("strong · alpaca 2")
    run(page, "Ahoy")
    second = finished(page, "alpaca 2 (strong)")

    def saved(kind: str) -> str:
        with page.expect_download() as download:
            page.get_by_role("button", name=f"Download {kind}").click()
        return Path(download.value.path()).read_text(encoding="utf-8")

    runs = json.loads(saved("JSON"))
    assert [each["texts"] for each in runs] == [{"generated": second}, {"generated": first}]
    assert runs[0]["values"] == {"prompt": "Ahoy"}
    assert runs[0]["answers"][0]["blend"]["weights"] == {"alpaca": 2}
    text = saved("Markdown")
    assert text.startswith("# Short\n\n## ")
    assert f"> Ahoy\n\n**generated**\n\n{second}\n\n*alpaca 2 (strong)*" in text


SAVE = """async (run) => {
    const { earlierRuns } = await import("/assets/earlier.js");
    const kept = { all: () => [run] };
    const { element, draw } = earlierRuns({ name: "Workshop", markdown: false }, kept, {});
    draw(null);
    const saved = [];
    URL.createObjectURL = (blob) => (saved.push(blob), "blob:");
    for (const button of element.querySelectorAll("button")) if (button.textContent.startsWith("Download")) button.click();
    return Promise.all(saved.map((blob) => blob.text()));
}"""


def test_a_stopped_run_is_saved_with_what_was_asked_for_and_public_names(page: Any) -> None:
    stopped = {
        "id": "1", "time": 0, "workflow": "__workflow__", "values": {"prompt": "Ahoy"}, "blend": {"__component__": "x"},
        "mixed": "alpaca 0.7", "texts": {"": "text"}, "answers": [], "notes": [], "status": "stopped", "seconds": 1,
    }  # fmt: skip
    as_json, as_markdown = page.evaluate(SAVE, stopped)
    (saved,) = json.loads(as_json)
    assert (saved["workflow"], saved["blend"]) == ("default", {"default": "x"})
    assert as_markdown.startswith("# Workshop\n")
    assert as_markdown.endswith("> Ahoy\n\ntext\n\n*stopped: alpaca 0.7*\n")
    _, of_a_bare_model = page.evaluate(SAVE, stopped | {"mixed": ""})
    assert of_a_bare_model.endswith("text\n\n*stopped*\n")


# Loading and keys.


def test_behind_a_key_and_while_loading(browser: Any, folder: Path) -> None:
    path = folder / "locked.yml"
    path.write_text(LOCKED, encoding="utf-8")
    with served(path, load_models=False, env={"KEY": "sesame"}) as locked, browsing(browser, locked.page) as page:
        assert page.url == f"{locked.page}/login"
        page.get_by_label("API key").fill("guess")
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("alert")).to_have_text("This key is not known here.")
        page.get_by_label("API key").fill("sesame")
        page.get_by_role("button", name="Sign in").click()
        bar = page.get_by_role("progressbar", name="Loading")
        assert bar.evaluate("(bar) => bar.position") == -1  # it moves, though nobody knows how far it is
        locked.compose.progress = Progress("base", 43, 100)
        page.get_by_text("Loading… 43 %").wait_for()
        assert bar.evaluate("(bar) => bar.value") == 43
        expect(page.get_by_role("status").filter(has_text="base")).to_be_visible()
        assert page.get_by_role("button", name="Run", exact=True).is_disabled()
        asyncio.run_coroutine_threadsafe(locked.compose.load(), locked.loop).result(60)
        expect(page.get_by_role("button", name="Run", exact=True)).to_be_enabled()
        expect(bar).to_have_count(0)
        run(page, "Ahoy")
        text = finished(page, DEFAULT)
        curl, python = show_calls(page)
        assert "sesame" not in page.content()
        secret = {"MODEL_COMPOSE_API_KEY": "sesame", "PATH": "/usr/bin:/bin"}
        answer = json.loads(subprocess.check_output(["bash", "-c", curl.replace("curl ", "curl -sS ", 1)], env=secret))
        assert answer["output"] == {"generated": text}
        assert subprocess.check_output([sys.executable, "-c", python], env=secret).decode() == f"{text}\n"
        page.context.clear_cookies()  # as after twelve hours
        page.get_by_role("button", name="Run", exact=True).click()
        expect(page.get_by_text("You are signed out.")).to_be_visible()
        assert page.get_by_role("textbox", name="prompt").input_value() == "Ahoy"


def test_a_model_without_adapters_says_what_it_is_and_has_no_mixer(browser: Any, folder: Path) -> None:
    path = folder / "bare.yml"
    bare = YAML[: YAML.index("  peft_adapters:")] + YAML[YAML.index("  actions:") :].replace(
        "      blend: ${input.blend}\n", ""
    )
    path.write_text(bare, encoding="utf-8")
    with served(path, load_models=False) as site, browsing(browser, site.page) as page:
        expect(page.locator(".settings:visible .what")).to_have_text("base./base · float32 · huggingface")
        expect(page.get_by_role("slider")).to_have_count(0)


def test_a_page_without_workflows_says_so(browser: Any, folder: Path) -> None:
    path = folder / "private.yml"
    path.write_text(re.sub(r"title: \w+", "private: true", YAML).replace("private: true, private", "private"))
    with served(path, load_models=False) as site, browsing(browser, site.page) as page:
        expect(page.get_by_text("All workflows of this file are private.")).to_be_visible()
