"""The log of the page: what a browser asks for by itself has no line, a failure and everything else has one."""

import logging
from pathlib import Path

import httpx
import pytest

from model_compose.compose import Compose
from model_compose.loading import load
from model_compose.servers.access import Access
from model_compose.servers.webui import create_page

PATHS = ["/", "/assets/page.js", "/assets/absent.js", "/state", "/page.json"]


async def test_what_a_browser_asks_for_by_itself_has_no_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    page = Access(create_page(Compose(load([folder / "model-compose.yml"], {})), None))
    caplog.set_level(logging.DEBUG, logger="model_compose.servers.access")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(page), base_url="http://127.0.0.1") as client:
        for path in PATHS:
            await client.get(path)
    lines = [record for record in caplog.records if record.name == "model_compose.servers.access"]
    told = {path: next(record.levelno for record in lines if f" {path} " in record.getMessage()) for path in PATHS}
    assert told == {
        "/": logging.INFO, "/assets/page.js": logging.DEBUG, "/assets/absent.js": logging.INFO,
        "/state": logging.DEBUG, "/page.json": logging.INFO,
    }  # fmt: skip
