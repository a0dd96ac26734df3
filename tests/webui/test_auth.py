"""The page's door: nothing passes it without a key, and signing in gives a session that is not the key."""

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from starlette.responses import PlainTextResponse

from model_compose.servers.webui.auth import Door


@pytest.fixture
async def outside() -> AsyncIterator[httpx.AsyncClient]:
    """A client in front of a locked door."""

    async def inside(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("inside")(scope, receive, send)

    door = Door(inside, [SecretStr("sesame")], "A <b>title</b>")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://page") as client:
        yield client


@pytest.mark.parametrize("path", ["/", "/page.json", "/runs", "/state", "/assets/page.js", "/login/"])
async def test_nothing_passes_the_door_without_a_key(outside: httpx.AsyncClient, path: str) -> None:
    assert (await outside.get(path)).status_code == 401
    assert (await outside.post(path)).status_code == 401
    assert (await outside.get(path, headers={"Authorization": "Bearer other"})).status_code == 401
    assert (await outside.get(path, headers={"Authorization": "Bearer sesame"})).text == "inside"
    browsing = await outside.get(path, headers={"Accept": "text/html"})
    assert (browsing.status_code, browsing.headers["location"]) == (303, "/login")


async def test_signing_in_gives_a_session_that_is_not_the_key(outside: httpx.AsyncClient) -> None:
    form = await outside.get("/login")
    assert "A &lt;b&gt;title&lt;/b&gt;" in form.text
    wrong = await outside.post("/login", data={"key": "guess"})
    assert (wrong.status_code, "set-cookie" in wrong.headers) == (401, False)
    right = await outside.post("/login", data={"key": "sesame", "next": "http://evil.example"})
    assert (right.status_code, right.headers["location"]) == (303, "/")
    cookie = right.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "sesame" not in cookie
    assert (await outside.get("/page.json")).text == "inside"


async def test_another_site_cannot_sign_a_browser_in(outside: httpx.AsyncClient) -> None:
    answer = await outside.post("/login", data={"key": "sesame"}, headers={"Origin": "http://evil.example"})
    assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)
