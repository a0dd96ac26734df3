"""The page's files: the vendored ones are what their lock says, with their licence, and nothing points elsewhere."""

import base64
import hashlib
import json
import re

import pytest

from model_compose.servers.webui.auth import ASSETS

VENDOR = ASSETS / "vendor"
LOCK = json.loads((VENDOR / "lock.json").read_text(encoding="utf-8"))


def test_vendored_files_are_what_the_lock_says() -> None:
    """integrity: of the package on npm, by which its files were checked when they came; sha256: of each file here."""
    locked: dict[str, str] = {}
    for package in LOCK:
        assert re.fullmatch(r"sha512-[A-Za-z0-9+/]{86}==", package["integrity"])
        assert any(name.endswith("LICENSE") for name in package["files"])
        locked |= package["files"]
    here = [path for path in VENDOR.rglob("*") if path.is_file() and path.name != "lock.json"]
    digests = {
        path.relative_to(VENDOR).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in here
    }
    assert digests == locked


@pytest.mark.parametrize("package", LOCK, ids=lambda package: package["name"])
def test_vendored_files_say_their_version(package: dict[str, str]) -> None:
    script = next(name for name in package["files"] if name.endswith("js"))
    assert package["version"] in (VENDOR / script).read_text(encoding="utf-8")[:300]


def test_no_file_of_ours_names_another_host_or_brings_inline_code() -> None:
    ours = [path for path in ASSETS.iterdir() if path.is_file()]
    assert len(ours) > 10
    for path in ours:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?://(?!127\.0\.0\.1)", text.replace("http://www.w3.org/2000/svg", "")), path
        if path.suffix == ".html":
            assert not re.search(r"<script(?![^>]* src=)|\son\w+=|javascript:", text), path
