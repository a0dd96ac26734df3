"""How the page looks and is operated: measure, contrast, focus, ticks, themes, tabs; and /docs beside it."""

from typing import Any

import pytest

from tests.webui.conftest import Site, browsing, finished, run

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

CONTRAST = """(pairs) => {
    const probe = document.createElement("i");
    document.body.append(probe);
    const light = (name) => {
        probe.style.color = `var(--${name})`;
        const parts = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255);
        const [red, green, blue] = parts.map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
    };
    return pairs.map(([one, other]) => {
        const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    });
}"""
"""WCAG 2's contrast of two of the page's colours, from 1 to 21."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_controls_stand_out(browser: Any, site: Site, scheme: str) -> None:
    texts = [(ink, ground) for ink in ("ink", "soft", "accent") for ground in ("back", "card")]
    texts += [("bad", "bad-soft"), ("on-accent", "accent"), ("ink", "accent-soft")]
    controls = [(edge, ground) for edge in ("edge", "accent") for ground in ("back", "card")]  # frames, tracks, thumbs
    with browsing(browser, site.page, color_scheme=scheme) as page:
        page.locator(".panel").first.wait_for()
        assert min(page.evaluate(CONTRAST, texts)) >= 4.5
        assert min(page.evaluate(CONTRAST, controls)) >= 3


def test_the_theme_can_be_chosen_and_is_kept(browser: Any, site: Site) -> None:
    def background(page: Any) -> str:
        return str(page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))

    with browsing(browser, site.page, color_scheme="light") as page:
        button = page.get_by_role("button", name="Theme")
        light = background(page)
        button.click()
        expect(button).to_have_text("Theme: light")
        assert background(page) == light
        button.click()
        expect(button).to_have_text("Theme: dark")
        dark = background(page)
        assert dark != light
        page.reload()
        expect(button).to_have_text("Theme: dark")
        assert background(page) == dark


@pytest.mark.parametrize("width", [420, 1280, 1920])
def test_lines_keep_a_readable_length_and_nothing_sticks_out(browser: Any, site: Site, width: int) -> None:
    with browsing(browser, site.page, viewport={"width": width, "height": 900}) as page:
        run(page, "Ahoy")
        finished(page, "alpaca 0.7 · pirate 0.8 (default)")
        page.evaluate("document.querySelector('.stage .text').textContent = 'word '.repeat(400)")
        measure = page.locator(".stage .text").evaluate(
            "(text) => text.clientWidth / parseFloat(getComputedStyle(text).fontSize)"
        )
        assert 18 < measure < 45  # in em, of which a character takes about half
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_what_has_the_focus_has_an_outline(page: Any) -> None:
    page.get_by_role("textbox", name="prompt").focus()
    for name in ("Run", "Stop", "Blend", "alpaca", "alpaca weight"):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            """() => {
                const { outlineStyle, outlineWidth } = getComputedStyle(document.activeElement);
                const names = [document.activeElement.getAttribute("aria-label"), document.activeElement.textContent,
                    document.activeElement.labels?.[0]?.textContent];
                return [names.filter(Boolean), outlineStyle, parseFloat(outlineWidth)];
            }"""
        )
        assert name in focused[0]
        assert focused[1:] == ["solid", 2]


def test_the_tick_of_one_stands_where_the_thumb_stands_at_one(page: Any) -> None:
    places = page.locator(".weight:visible").first.evaluate(
        """(row) => {
            const middle = (box) => box.left + box.width / 2;
            const slider = row.querySelector("[type=range]").getBoundingClientRect();
            const tick = middle(row.querySelector(".ticks .one").getBoundingClientRect());
            return [tick, slider.left + 9 + (slider.width - 18) / 2];
        }"""
    )  # the thumb is 18 wide, and 1 is the middle of 0 to 2
    assert places[0] == pytest.approx(places[1], abs=1)


def test_copy_is_there_without_a_pointer_over_it(page: Any) -> None:
    run(page, "Ahoy")
    finished(page, "alpaca 0.7 · pirate 0.8 (default)")
    copy = page.locator(".stage").get_by_role("button", name="Copy", exact=True)
    expect(copy).to_be_visible()
    assert copy.evaluate("(button) => getComputedStyle(button).opacity") == "1"
    page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(); }")  # as without https
    page.once("dialog", lambda dialog: dialog.dismiss())
    with page.expect_event("dialog") as asked:
        copy.click()
    assert asked.value.default_value == page.locator(".stage .text").text_content()


def test_arrow_keys_go_from_tab_to_tab(page: Any) -> None:
    page.get_by_role("tab", name="Short").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Long")).to_be_focused()
    assert page.get_by_role("tabpanel").count() == 1
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Short")).to_have_attribute("aria-selected", "true")


def test_every_control_has_a_name(page: Any) -> None:
    run(page, "Ahoy")
    finished(page, "alpaca 0.7 · pirate 0.8 (default)")
    for role in ("textbox", "combobox", "slider", "spinbutton", "button", "tab", "tabpanel"):
        controls = page.get_by_role(role).all()
        assert controls
        for control in controls:
            shown = control.aria_snapshot()
            assert '"' in shown.splitlines()[0], shown


def test_the_list_of_routes_is_dark_where_the_system_is(browser: Any, site: Site) -> None:
    """Its links were pale, as for a dark page, on white."""
    with browsing(browser, f"{site.api}/docs", color_scheme="dark") as page:
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light dark"
        scheme, colour = page.locator("a").first.evaluate(
            "(link) => [getComputedStyle(link).colorScheme, getComputedStyle(document.body).color]"
        )
        assert (scheme, colour) == ("light dark", "rgb(255, 255, 255)")
