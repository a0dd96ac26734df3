"""A fake Hugging Face Hub on 127.0.0.1 for tests, with the few endpoints that huggingface_hub calls.

It answers with the same JSON and error codes as huggingface.co, and tests can make it break connections. So the real client
code is tested without the real Hub.
"""

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


@dataclass(frozen=True)
class Repository:
    """One commit of a model repository. If it is `gated`, its listing is public, but its files need `token`."""

    files: Mapping[str, bytes]
    gated: bool = False
    private: bool = False
    token: str = "hf_right"

    @property
    def commit(self) -> str:
        digest = hashlib.sha1()
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + b"\0" + content + b"\0")
        return digest.hexdigest()


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    authorization: str | None
    range: str | None


@dataclass
class Hub:
    """The server and its state. A test may change `repositories`, `break_after` and `status` between requests."""

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    # One number for each transfer to break: the next transfer of a longer file breaks off after so many bytes.
    break_after: list[int] = field(default_factory=list)
    status: int | None = None  # if set, the status of every answer
    connections: set[socket.socket] = field(default_factory=set)
    _server: ThreadingHTTPServer | None = None

    def add(self, name: str, files: Mapping[str, bytes], *, gated: bool = False, private: bool = False) -> Repository:
        self.repositories[name] = Repository(dict(files), gated, private)
        return self.repositories[name]

    def use(self, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
        """Point this process's huggingface_hub to this server. It reads the environment only on import, so we patch it."""
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", self.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)

    def environment(self, home: Path, **extra: str) -> dict[str, str]:
        """The environment that points another process to this server."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return {**kept, "HF_ENDPOINT": self.address, "HF_HOME": str(home), **extra}

    def stop(self) -> None:
        """Stop the server and close open connections, which clients would otherwise reuse for the next request."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None
        for connection in list(self.connections):
            with suppress(OSError):  # the client has closed it
                connection.shutdown(socket.SHUT_RDWR)

    def start(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()


@contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()


def python(code: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run code in another process, for settings that huggingface_hub reads on import."""
    return subprocess.run(
        [sys.executable, "-c", code], env=dict(environment), capture_output=True, text=True, timeout=120, check=False
    )


_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            hub.connections.add(self.connection)

        def finish(self) -> None:
            hub.connections.discard(self.connection)
            super().finish()

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            token = self.headers.get("authorization")
            hub.requests.append(Request(self.command, path, token, self.headers.get("range")))
            if hub.status is not None:
                return self._refuse(hub.status)
            api, file = _API.fullmatch(path), _FILE.fullmatch(path)
            asked = api or file
            if asked is None:
                return self._refuse(404)
            repository = hub.repositories.get(asked["repo"])
            right = repository is not None and token == f"Bearer {repository.token}"
            if token is not None and not right:
                return self._refuse(401, message="Invalid credentials in Authorization header")
            if repository is None or (repository.private and not right):
                return self._refuse(401, "RepoNotFound")
            if asked["revision"] not in (None, "main", repository.commit):
                return self._refuse(404, "RevisionNotFound")
            if file is not None:
                if repository.gated and not right:
                    return self._refuse(401 if token is None else 403, "GatedRepo")
                return self._send_file(repository, file["file"])
            if api is not None and api["what"] == "tree":
                return self._send_json(
                    [
                        {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                        for name, content in repository.files.items()
                    ]
                )
            siblings = [{"rfilename": name, "size": len(content)} for name, content in repository.files.items()]
            return self._send_json({"id": asked["repo"], "sha": repository.commit, "siblings": siblings})

        def _send_file(self, repository: Repository, name: str) -> None:
            if name not in repository.files:
                return self._refuse(404, "EntryNotFound")
            content = repository.files[name]
            start = int(match[1]) if (match := re.match(r"bytes=(\d+)-", self.headers.get("range") or "")) else 0
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{_etag(content)}"')
            self.send_header("X-Repo-Commit", repository.commit)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if self.command == "HEAD":
                return None
            if hub.break_after and len(content) - start > hub.break_after[0]:
                self.wfile.write(content[start : start + hub.break_after.pop(0)])
                self.close_connection = True
                return None
            self.wfile.write(content[start:])
            return None

        def _send_json(self, data: object) -> None:
            body = json.dumps(data).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _refuse(self, status: int, code: str | None = None, message: str | None = None) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            if message:
                self.send_header("X-Error-Message", message)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
