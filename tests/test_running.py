"""The records of what is up: each is held by a lock, found by its files, and not believed once its process has died."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from model_compose import running as running_module
from model_compose.errors import ConfigError, Conflict
from model_compose.loading import ComposeFile, load
from model_compose.oneshot import _lines
from model_compose.running import (
    Mix,
    Model,
    Record,
    find,
    find_all,
    fingerprint,
    held,
    hold,
    log_file,
    state_dir,
)
from tests.tiny import YAML
from tests.waiting import SECONDS


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "model-compose"


@pytest.fixture
def loaded(tmp_path: Path) -> ComposeFile:
    return load_in(tmp_path / "project")


def load_in(folder: Path, yaml: str = YAML) -> ComposeFile:
    folder.mkdir(exist_ok=True)
    path = folder / "model-compose.yml"
    path.write_text(yaml, encoding="utf-8")
    return load([path], {})


def test_a_held_record_is_found_and_a_released_one_is_gone(loaded: ComposeFile, tmp_path: Path) -> None:
    before = time.time()
    assert find(loaded.files) is None
    with hold(loaded.files, loaded.config, tmp_path / "log") as running:
        first = find(loaded.files)
        assert first is not None
        assert (first.ready, first.config) == (False, fingerprint(loaded.config))
        assert before <= first.started <= time.time()
        running.update(api="http://127.0.0.1:1", ready=True)
        mixes = Mix("default", {"alpaca": 0.7, "pirate": 0.8}), Mix("strong", {"alpaca": 2.0}), Mix("plain")
        assert find(loaded.files) == Record(
            os.getpid(), fingerprint(loaded.config), "http://127.0.0.1:1", ready=True,
            files=tuple(map(str, loaded.files)), started=first.started, log=str(tmp_path / "log"),
            models=(Model("default", "./base", "huggingface", ("alpaca", "pirate"), mixes),),
        )  # fmt: skip
    assert find(loaded.files) is None


def test_a_record_holds_no_secret(tmp_path: Path) -> None:
    yaml = YAML.replace("base_path: /api", "base_path: /api, api_keys: [s3cret]")
    yaml = yaml.replace("model: ./base", "model: {repository: org/name, token: s3cret}")
    loaded = load_in(tmp_path / "keys", yaml)
    with hold(loaded.files, loaded.config):
        (path,) = state_dir().glob("*.json")
        assert "org/name" in path.read_text()
        assert "s3cret" not in path.read_text()


def test_a_second_service_of_the_same_files_is_refused(loaded: ComposeFile) -> None:
    with hold(loaded.files, loaded.config) as running:
        running.update(api="http://127.0.0.1:1")
        with (
            pytest.raises(
                Conflict, match=r"^model-compose\.yml is up already at http://127\.0\.0\.1:1; `model-compose down`"
            ),
            hold(loaded.files, loaded.config),
        ):
            pass
        assert find(loaded.files) is not None  # the refusal leaves the first one's record alone


def test_services_of_different_files_do_not_meet(tmp_path: Path) -> None:
    one, two = load_in(tmp_path / "app.one"), load_in(tmp_path / "app.two")
    assert find_all() == []
    with hold(one.files, one.config), hold(two.files, two.config):
        assert find(one.files) is not None
        assert [record.files for record in find_all()] == [tuple(map(str, each.files)) for each in (one, two)]
    assert find_all() == []
    assert log_file(one.files) != log_file(two.files)
    assert find((*one.files, *two.files)) is None


def test_a_killed_service_is_not_up(loaded: ComposeFile, state: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from model_compose.loading import load\n"
        "from model_compose.running import hold\n"
        "loaded = load([Path(sys.argv[1])], {})\n"
        "with hold(loaded.files, loaded.config): print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(loaded.files[0])], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        found = find(loaded.files)
        assert found is not None
        assert found.pid == child.pid
        child.kill()
    assert list(state.glob("*.json"))
    assert find(loaded.files) is None
    assert not list(state.glob("*.json"))
    with hold(loaded.files, loaded.config):
        assert find(loaded.files) is not None


def test_a_record_that_cannot_be_understood_is_no_service(loaded: ComposeFile, state: Path) -> None:
    with hold(loaded.files, loaded.config):
        (path,) = state.glob("*.json")
        for text in ("{", "", "[]", "{}", '{"pid": "x"}', '{"pid": 0}', '{"pid": 1, "models": 5}', "\xff"):
            path.write_text(text, encoding="latin-1")
            assert find(loaded.files) is None
            assert list(held()) == [(path, None)]
        path.write_text('{"pid": 1, "from": "a later version"}')
        assert find(loaded.files) == Record(1)


def test_listing_passes_over_what_is_no_service_of_ours(loaded: ComposeFile, state: Path) -> None:
    with hold(loaded.files, loaded.config):
        (state / "a.json").mkdir()
        (state / "b.json").symlink_to(state / "nowhere")
        (state / "foreign.json").touch()
        (state / "foreign.lock").mkdir()  # cannot be locked, as another user's file cannot
        assert [record.files for record in find_all()] == [tuple(map(str, loaded.files))]
        assert (state / "foreign.json").exists()


def test_looking_for_a_service_never_keeps_one_from_starting(
    loaded: ComposeFile, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`find` takes the lock for an instant. A service that starts in that instant waits for the lock."""
    from threading import Timer

    from filelock import FileLock

    with hold(loaded.files, loaded.config):
        (path,) = state.glob("*.lock")
    monkeypatch.setattr(running_module, "PATIENCE_SECONDS", SECONDS)
    lock = FileLock(path, thread_local=False)
    lock.acquire()
    Timer(0.2, lock.release).start()
    with hold(loaded.files, loaded.config):
        assert find(loaded.files) is not None


def test_fingerprint_tells_files_apart_that_answer_differently(loaded: ComposeFile, tmp_path: Path) -> None:
    same = load_in(tmp_path / "same", f"# a comment\n{YAML}")
    other = load_in(tmp_path / "other", YAML.replace("weight: 0.7", "weight: 0.6"))
    prompt = load_in(tmp_path / "prompt", YAML.replace("text: ${", "text: Say ${"))
    sampling = load_in(tmp_path / "sampling", YAML.replace("do_sample: false", "top_k: 3"))
    prints = [fingerprint(one.config) for one in (loaded, same, other, prompt, sampling)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


def test_state_folder_that_cannot_be_made_says_what_to_set(
    loaded: ComposeFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert find(loaded.files) is None
    with (
        pytest.raises(ConfigError, match="set XDG_STATE_HOME to a folder that can be written"),
        hold(loaded.files, loaded.config),
    ):
        pass


def test_state_folder_follows_the_xdg_rule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert state_dir() == tmp_path / "state" / "model-compose"
    monkeypatch.delenv("XDG_STATE_HOME")
    assert state_dir() == Path.home() / ".local" / "state" / "model-compose"


def test_lines_of_an_event_stream_end_at_newlines_alone() -> None:
    chunks = ["data: a\u2028b\x85c\nda".encode(), "ta: ü".encode()[:-1], "ü".encode()[-1:], b"\n\n"]
    assert list(_lines(iter(chunks))) == ["data: a\u2028b\x85c", "data: ü", ""]
