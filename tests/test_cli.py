"""The command line as a user runs it: output, errors and exit code, in a process of its own where that matters."""

import asyncio
import fcntl
import io
import json
import logging
import os
import pty
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import chdir, contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from model_compose.cli import execute
from model_compose.commands.inputs import read_input
from model_compose.commands.run import service
from model_compose.compose import Compose
from model_compose.errors import InputError
from model_compose.loading import load
from model_compose.oneshot import run_here, run_there
from model_compose.progress import Progress, silent
from model_compose.running import Mix, find, hold, state_dir
from model_compose.terminal import Printer, bars, mix_text
from tests import tiny
from tests.conftest import serving
from tests.test_config import FIRST_EXAMPLE
from tests.waiting import SECONDS, wait_until

CUT = "⚠ the text was cut at max_output_length (12 tokens)\n"
INPUT = '{"prompt": "Once upon a time"}'
SOURCE = Path(__file__).parent.parent / "src"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the test a state folder of its own, and a terminal that is 80 columns wide."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", str(SOURCE))
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("HUGGINGFACE_TOKEN", "PYTHONIOENCODING"):
        monkeypatch.delenv(name, raising=False)


def start(*arguments: str, cwd: Path, **how: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "model_compose", *arguments],
        cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE, **how,
    )  # fmt: skip


def cli(*arguments: str, cwd: Path, stdin: str = "", **how: Any) -> tuple[int, str, str]:
    """Runs a command as a process. Returns its exit code, stdout and stderr."""
    with start(*arguments, cwd=cwd, **how) as process:
        try:
            out, err = process.communicate(stdin, SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return process.returncode, out, err


def in_terminal(*arguments: str, cwd: Path, columns: int = 60) -> tuple[int, str]:
    """Runs a command in a terminal of this width. Returns its exit code and what the terminal shows, without its codes."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm"}
    command = [sys.executable, "-m", "model_compose", *arguments]
    with subprocess.Popen(command, cwd=cwd, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with open(ours, "rb", buffering=0) as terminal, suppress(OSError):  # EIO, once the process has ended
            while piece := terminal.read(1 << 16):
                shown += piece
    return process.returncode, re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", shown.decode()).replace("\r\n", "\n")


def called(*arguments: str, cwd: Path, stdin: str = "") -> tuple[int, str, str]:
    """Runs a command in this process, which saves the seconds of imports. pytest keeps the log, so stderr lacks it."""
    out, err = io.BytesIO(), io.BytesIO()
    streams = [io.TextIOWrapper(stream, encoding="utf-8", write_through=True) for stream in (out, err)]
    log = logging.getLogger("model_compose")
    level = log.level
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(streams[0]), redirect_stderr(streams[1]), chdir(cwd):
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        code = execute(arguments)
    log.setLevel(level)
    return code, out.getvalue().decode(), err.getvalue().decode()


@pytest.fixture
def folder(tmp_path: Path, project: Path) -> Path:
    """A folder with a tiny project of its own."""
    return shutil.copytree(project.parent, tmp_path / "app.v1")


@contextmanager
def as_running(path: Path, url: str) -> Iterator[None]:
    """Within the block the test's own server counts as the running service of the file."""
    loaded = load([path], {})
    with hold(loaded.files, loaded.config) as running:
        running.update(api=url, base_path="/api", ready=True)
        yield


# Without any model.


def test_validate_and_where_the_file_may_be_named(folder: Path) -> None:
    expected = (0, "✅ Configuration is valid (controller: http-server, 1 component(s), 1 workflow(s))\n", "")
    assert cli("validate", cwd=folder) == expected
    assert cli("-f", "model-compose.yml", "validate", cwd=folder) == expected
    assert cli("validate", "-f", str(folder / "model-compose.yml"), cwd=folder.parent) == expected


def test_files_before_and_after_the_command_merge_in_that_order(folder: Path) -> None:
    for name, precision in (("one", "float16"), ("two", "float8")):
        (folder / f"{name}.yml").write_text(f"component: {{precision: {precision}}}\n")
    assert called("-f", "model-compose.yml", "-f", "two.yml", "validate", "-f", "one.yml", cwd=folder)[0] == 0
    code, out, err = called("-f", "model-compose.yml", "-f", "one.yml", "validate", "-f", "two.yml", cwd=folder)
    assert (code, out) == (1, "")
    assert err.startswith(
        "❌ two.yml:1: component.precision: expected 'auto', 'float32', 'float16' or 'bfloat16', not 'flo"
    )


def test_variables_of_the_command_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "model-compose.yml"
    path.write_text(tiny.YAML.replace("precision: float32", "precision: ${env.PRECISION}"))
    code, _, err = called("validate", cwd=folder)
    assert code == 1
    assert "model-compose.yml:12: component.precision: the environment variable PRECISION is not set" in err
    (folder / "some.env").write_text("PRECISION=float16\n")
    assert called("validate", "--env-file", "some.env", cwd=folder)[0] == 0
    monkeypatch.setenv("PRECISION", "wrong")
    assert "not 'wrong'" in called("validate", "--env-file", "some.env", cwd=folder)[2]
    assert called("validate", "--env-file", "some.env", "-e", "PRECISION=bfloat16", cwd=folder)[0] == 0


@pytest.mark.parametrize("variables", [(), ("-e", "HUGGINGFACE_TOKEN=hf_x")])
def test_first_example_is_valid_with_and_without_a_token(tmp_path: Path, variables: tuple[str, ...]) -> None:
    (tmp_path / "model-compose.yml").write_text(FIRST_EXAMPLE, encoding="utf-8")
    assert called("validate", *variables, cwd=tmp_path)[0] == 0


def test_schema_is_valid_json_schema_and_accepts_the_first_example(tmp_path: Path) -> None:
    code, out, err = called("schema", cwd=tmp_path)
    assert (code, err) == (0, "")
    schema = json.loads(out)
    jsonschema_rs.meta.validate(schema)
    assert jsonschema_rs.Draft202012Validator(schema).is_valid(yaml.safe_load(FIRST_EXAMPLE))


FAILURES = [
    (("run", "--input", "{bad"), "❌ --input is not valid JSON: key must be a string at line 1 column 2; example: "
     "--input '{\"prompt\": \"…\"}'\n"),
    (("run", "--input", ""), "❌ --input is empty; example: --input '{\"prompt\": \"…\"}'\n"),
    (("run", "--input", '{"prompt": "\\ud800"}'), "❌ --input is not valid JSON: "),
    (("run", "--input", '{"prompt": NaN}'), "❌ --input is not valid JSON: "),
    (("run", "--input", "@nope.json"), "❌ --input: nope.json cannot be read (No such file or directory)\n"),
    (("run", "--blend", "{bad"), "❌ --blend is not valid JSON: key must be a string at line 1 column 2; example: "
     "'{\"alpaca\": 0.7}'\n"),
    (("run", "--input", INPUT, "--blend", "alpaca=1,pirate"), "❌ --blend: 'pirate' is not NAME=WEIGHT; example: "),
    (("run",), "❌ input.prompt is required (text); for example --input '{\"prompt\": \"…\"}'\n"),
    (("run", "--input", '{"promt": "x"}'), "❌ input.prompt is required (text); input.promt is not an input of this "
     "workflow; did you mean 'prompt'?\n"),
    (("run", "nope", "--input", INPUT), "❌ there is no workflow 'nope'; known: __workflow__\n"),
    (("run", "--input", INPUT, "--blend", "strng"), "❌ blend: unknown blend 'strng'; did you mean 'strong'? known: "),
    (("run", "--input", INPUT, "--output", "no/where"), "❌ --output: no folder no\n"),
    (("run", "--input", INPUT, "--output", "."), "❌ --output: . is a folder\n"),
    (("validate", "-e", "FOO"), "❌ -e FOO: expected NAME=VALUE\n"),
    (("validate", "--env-file", "nope.env"), "❌ nope.env: there is no such file (--env-file)\n"),
    (("validate", "-f", "nope.yml"), "❌ nope.yml: there is no such file\n"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "expected"), FAILURES, ids=[" ".join(case[0]) for case in FAILURES])
def test_failure_is_one_sentence_on_stderr_and_exit_code_1(
    folder: Path, arguments: tuple[str, ...], expected: str
) -> None:
    code, out, err = called(*arguments, cwd=folder)
    assert (code, out) == (1, "")
    assert err.startswith(expected)
    assert "Traceback" not in err


def test_no_file_in_the_folder(tmp_path: Path) -> None:
    for command in (("validate",), ("up",), ("up", "-d"), ("run", "--input", INPUT)):
        code, out, err = called(*command, cwd=tmp_path)
        assert (code, out) == (1, "")
        assert err == (
            f"❌ no model-compose.yml or model-compose.yaml in {tmp_path}; go to its folder, or name it with -f FILE\n"
        )


@pytest.mark.parametrize("arguments", [("run", "--bogus"), ("nope",), ("run", "a", "b"), ("validate", "-f"), ()])
def test_wrong_usage_is_exit_code_2(folder: Path, arguments: tuple[str, ...]) -> None:
    code, out, err = called(*arguments, cwd=folder)
    assert code == 2
    assert "Usage: " in out + err or "Error: " in err
    assert "Traceback" not in err


def test_version_and_help(folder: Path) -> None:
    code, out, err = called("--version", cwd=folder)
    assert (code, err) == (0, "")
    assert out.startswith("model-compose ")
    for help_option in ("--help", "-h"):
        code, out, _ = called(help_option, cwd=folder)
        assert code == 0
        assert all(f"\n  {command} " in out for command in ("up", "down", "run", "validate", "schema"))


def test_help_wraps_the_sentences_of_commands_in_a_narrow_terminal(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    for command in ((), ("adapters",)):
        code, out, _ = called(*command, "--help", cwd=folder)
        assert code == 0
        assert "..." not in out.partition("Commands:")[2]
        assert max(map(len, out.splitlines())) <= 60
    code, out, _ = called("--help", cwd=folder)
    assert " down Stop the service of this file, after its running requests. run Run a" in " ".join(out.split())
    assert "start" not in [line.split()[0] for line in out.splitlines() if line.startswith("  ")]  # hidden


COMMANDS = [
    "init", "up", "down", "run", "ps", "status", "logs", "validate", "plan", "schema", "export", "setup",
    "adapters list", "adapters inspect",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_sentence_an_example_that_is_taken_and_fits_a_narrow_terminal(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = called(*command.split(), "--help", cwd=tmp_path)
    assert (code, err) == (0, "")
    sentence = out.split("\n\n")[1].strip()
    group, _, name = command.rpartition(" ")
    listing = called(*group.split(), "--help", cwd=tmp_path)[1]
    assert re.search(rf"^  {name} +{re.escape(sentence)}$", listing, re.MULTILINE), "the list cuts the sentence"
    program, *arguments = shlex.split(" ".join(out.rpartition("Example: ")[2].split()).partition(" > ")[0])
    assert (program, " ".join(arguments[: len(command.split())])) == ("model-compose", command)
    assert called(*arguments, "--help", cwd=tmp_path)[0] == 0
    monkeypatch.setenv("COLUMNS", "40")
    narrow = called(*command.split(), "--help", cwd=tmp_path)[1]
    assert max(map(len, narrow.splitlines())) <= 52  # typer wraps at 50 columns at the least


def test_reader_that_leaves_is_no_traceback(folder: Path) -> None:
    for command in ("schema", "validate"):
        line = f"{sys.executable} -m model_compose {command} | head -c 1"
        done = subprocess.run(line, shell=True, cwd=folder, capture_output=True, timeout=SECONDS)
        assert (len(done.stdout), done.stderr) == (1, b"")


def test_terminal_without_unicode(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert cli("validate", cwd=folder)[:2] == (
        0, "? Configuration is valid (controller: http-server, 1 component(s), 1 workflow(s))\n",
    )  # fmt: skip
    assert cli("validate", "-f", "nope.yml", cwd=folder)[::2] == (1, "? nope.yml: there is no such file\n")


QUICK = ["--help", "validate", "schema", "run --help", "down", "ps", "status", "init --list", "logs"]


@pytest.mark.parametrize("arguments", map(str.split, QUICK), ids=QUICK)
def test_quick_commands_import_nothing_heavy(folder: Path, arguments: list[str]) -> None:
    script = (
        "import os, sys\n"
        "os._exit = lambda code: print('heavy:', *sorted({'torch', 'transformers', 'ray', 'fastapi', 'peft',"
        " 'huggingface_hub', 'numpy'} & set(sys.modules)), file=sys.stderr)\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "from model_compose.cli import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=SECONDS)
    assert done.stderr.splitlines()[-1] == "heavy:"


def test_down_where_nothing_is_up(folder: Path) -> None:
    assert called("down", cwd=folder) == (0, "", "model-compose.yml is not up\n")
    assert called("stop", cwd=folder) == (0, "", "model-compose.yml is not up\n")


def test_down_names_what_is_up_where_it_ends_nothing(folder: Path, tmp_path: Path) -> None:
    nowhere = (
        f"❌ no model-compose.yml or model-compose.yaml in {tmp_path}; go to its folder, or name it with -f FILE\n"
    )
    assert called("down", cwd=tmp_path) == (1, "", f"{nowhere}nothing is up\n")
    spaced = tmp_path / "my app"
    spaced.mkdir()
    for name in ("one.yml", "two.yml", "three.yml"):
        (spaced / name).write_text(tiny.YAML, encoding="utf-8")
    with as_running(spaced / "one.yml", "http://127.0.0.1:9"), as_running(spaced / "two.yml", "http://127.0.0.1:10"):
        (spaced / "two.yml").unlink()  # so `down` has no file to find it by
        expected = [
            "these are up; each line ends one:",
            f"  kill {os.getpid()}  # http://127.0.0.1:10/api",
            f"  model-compose down -f '{spaced}/one.yml'  # http://127.0.0.1:9/api",
        ]
        code, out, err = called("down", cwd=tmp_path)
        assert (code, out, err[: len(nowhere)]) == (1, "", nowhere)
        assert sorted(err[len(nowhere) :].splitlines()) == sorted(expected)
        code, out, err = called("down", "-f", str(spaced / "three.yml"), cwd=folder)
        assert (code, out) == (0, "")
        assert sorted(err.splitlines()) == sorted(["three.yml is not up", *expected])


def test_nothing_to_serve(folder: Path) -> None:
    (folder / "model-compose.yml").write_text(f"controller: {{}}\n{tiny.YAML[tiny.YAML.index('workflow:') :]}")
    code, _, err = called("up", cwd=folder)
    assert code == 1
    assert err == (
        "❌ model-compose.yml: the controller has neither adapter nor webui, so nothing would be served; add adapter: "
        "{type: http-server}\n"
    )


def test_port_in_use(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (folder / "model-compose.yml").write_text(tiny.YAML.replace("port: 0", f"port: {port}"))
        expected = (
            f"❌ port {port} on 127.0.0.1 is in use by another program; stop it, or set another port in the file\n"
        )
        code, out, err = cli("up", cwd=folder)
        assert (code, out) == (1, "")
        assert err.startswith(expected)
        code, out, err = cli("up", "-d", cwd=folder)
        assert (code, out) == (1, "")
        assert err.startswith(expected)
        assert "(the service did not start; its log: " in err

        theirs = folder / "their folder"
        theirs.mkdir()
        (theirs / "api.yml").write_text(tiny.YAML)
        with as_running(theirs / "api.yml", f"http://127.0.0.1:{port}"):
            assert called("up", cwd=folder) == (
                1, "", f"❌ port {port} is in use by the service of {theirs}/api.yml; stop it with `model-compose down -f "
                f"'{theirs}/api.yml'`, or set another port in the file\n",
            )  # fmt: skip


def test_api_key_that_is_not_set_keeps_up_from_starting(folder: Path) -> None:
    (folder / "model-compose.yml").write_text(tiny.YAML.replace("port: 0", 'port: 0, api_keys: ["${env.NO_SUCH_KEY}"]'))
    code, _, err = called("up", cwd=folder)
    assert code == 1
    assert err == (
        "❌ model-compose.yml:2: controller.adapter.api_keys.0: the environment variable NO_SUCH_KEY is not set; the API "
        "key would be missing, so the server refuses to start; set it, use --env-file or -e NO_SUCH_KEY=…\n"
    )


SEVERAL = """\
workflows:
  - {id: one, default: true, job: {}}
  - {id: two, job: {input: {prompt: "${input.tone as select/calm,loud}: ${input.how.much as text}, ${input.what}"}}}
  - {id: none, job: {input: {prompt: Hello, blend: "${input.mix}"}, output: ["${output}", "${input.n as integer}"]}}
  - {id: chat, job: {component: chat}}
  - {id: whole, job: {component: whole}}
components:
  - {id: one, type: model, task: text-generation, model: ./base, default: true, action: {prompt: "${input.prompt}",
     blend: "${input.blend}"}}
  - {id: chat, type: model, task: chat-completion, model: ./base, action: {messages: "${input.turns}"}}
  - {id: whole, type: model, task: text-generation, model: ./base, action: {prompt: "${input}"}}
"""


@pytest.mark.parametrize(
    ("text", "workflow", "value"),
    [
        ('{"prompt": "x"}', None, {"prompt": "x"}),
        ("Hello, you", None, {"prompt": "Hello, you"}),
        ("42", None, {"prompt": "42"}),
        ('"{}"', None, {"prompt": "{}"}),
        ("null", None, None),
        ("Hello", "chat", {"turns": [{"role": "user", "content": "Hello"}]}),
        ("Hello", "whole", "Hello"),
        ("42", "whole", 42),
    ],
)
def test_what_an_input_means(tmp_path: Path, text: str, workflow: str | None, value: Any) -> None:
    (tmp_path / "model-compose.yml").write_text(SEVERAL, encoding="utf-8")
    loaded = load([tmp_path / "model-compose.yml"], {})
    assert read_input(text, loaded, workflow) == value
    if value is not None:
        Compose(loaded).prepare(value, workflow=workflow)


@pytest.mark.parametrize(
    ("text", "workflow", "message"),
    [
        ("", None, """--input is empty; example: --input '{"prompt": "…"}'"""),
        ("{prompt: x}", None, "--input is not valid JSON: key must be a string at line 1 column 2; example: --input '{"),
        ("[1", "chat", """example: --input '{"turns": [{"role": "user", "content": "…"}]}'"""),
        ("Hello", "two", "--input is plain text, and this workflow has 2 inputs that must be text; name them, for example "
         """--input '{"tone": "calm", "how": {"much": "…"}, "what": "…"}'"""),
        ("Hello", "none", "plain text, and this workflow has no inputs that must be text; name them, for example --input "
         """'{"n": 1}'"""),
    ],
)  # fmt: skip
def test_an_input_that_means_nothing(tmp_path: Path, text: str, workflow: str | None, message: str) -> None:
    (tmp_path / "model-compose.yml").write_text(SEVERAL, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_input(text, load([tmp_path / "model-compose.yml"], {}), workflow)
    assert message in str(caught.value)


# On a running service, which is the tests' own server.


def test_run_on_a_running_service(project: Path, server: str, tmp_path: Path) -> None:
    cwd = project.parent
    with as_running(project, server):
        code, out, err = called("run", "--input", INPUT, cwd=cwd)
        assert (code, err) == (0, CUT)
        text = json.loads(out)["generated"]
        assert out == json.dumps({"generated": text}, indent=2, ensure_ascii=False) + "\n"

        # --stream is the same text
        assert called("run", "--input", INPUT, "--stream", cwd=cwd) == (0, f"{text}\n", CUT)

        # @file and standard input are the same input
        (tmp_path / "input.json").write_text("\ufeff" + INPUT, encoding="utf-8")
        assert called("run", "--input", f"@{tmp_path / 'input.json'}", cwd=cwd)[1] == out
        assert called("run", "--input", "-", cwd=cwd, stdin=INPUT)[1] == out

        # --output writes the file whole, and stdout stays empty
        target = tmp_path / "result.json"
        assert called("run", "--input", INPUT, "--output", str(target), cwd=cwd) == (0, "", CUT)
        assert target.read_text(encoding="utf-8") == out
        assert [path.name for path in tmp_path.glob(".*")] == []
        assert called("run", "--input", INPUT, "--output", "/dev/null", cwd=cwd) == (0, "", CUT)
        assert Path("/dev/null").is_char_device()

        # --blend by name and by weights
        strong = called("run", "--input", INPUT, "--blend", "strong", cwd=cwd)[1]
        assert strong != out
        assert called("run", "--input", INPUT, "--blend", '{"alpaca": 2}', cwd=cwd)[1] == strong
        assert called("run", "--input", INPUT, "--blend", "alpaca=2", cwd=cwd)[1] == strong
        assert called("run", "--input", INPUT, "--blend", "", cwd=cwd)[1] == out

        # plain text is the one text that the workflow needs; the last newline is dropped
        for given, stdin in (("Once upon a time", ""), ('"Once upon a time"', ""), ("-", "Once upon a time\n")):
            assert called("run", "--input", given, cwd=cwd, stdin=stdin)[1] == out

        # an error of the service is shown in the service's words
        code, out, err = called("run", "--input", INPUT, "--blend", "strng", cwd=cwd)
        assert (code, out) == (1, "")
        assert err.startswith("❌ blend: unknown blend 'strng'; did you mean 'strong'? known: default, strong, plain")
        code, out, err = called("run", "--stream", cwd=cwd)
        assert (code, out, err) == (
            1,
            "",
            '❌ input.prompt is required (text); for example --input \'{"prompt": "…"}\'\n',
        )


def test_a_terminal_is_told_which_blend_answered_and_how_fast(project: Path, server: str) -> None:
    cwd = project.parent
    told = r"\((12) tokens, [\d,.]+ tokens/s, length\)\n"
    with as_running(project, server):
        text = called("run", "-i", INPUT, "-s", cwd=cwd)[1]
        code, shown = in_terminal("run", "-i", INPUT, "-s", cwd=cwd)
        assert code == 0
        assert re.fullmatch(re.escape(f"{text}{CUT}default · alpaca 0.7 · pirate 0.8 ") + told, shown)
        code, shown = in_terminal("run", "-i", INPUT, "-b", "strong", cwd=cwd)
        assert re.fullmatch(r"\{.*\}\n" + re.escape(f"{CUT}strong · alpaca 2 ") + told, shown, re.DOTALL)
        assert in_terminal("run", "-i", INPUT, "-s", "--quiet", cwd=cwd) == (0, text)
        assert called("run", "-i", INPUT, "-s", "--quiet", cwd=cwd) == (0, text, "")


async def test_a_run_here_and_there_tell_the_same_of_their_answers(project: Path, server: str) -> None:
    loaded = load([project], {})
    value = {"prompt": "Once upon a time"}
    here = await run_here(loaded, value, None, {"alpaca": 1}, None, nullcontext(silent))
    with as_running(project, server):
        record = find(loaded.files)
        assert record is not None
        there = await asyncio.to_thread(run_there, record, loaded, value, None, {"alpaca": 1}, None)
    assert here.output == there.output
    assert [replace(each, tokens_per_second=0) for each in here.answers] == [
        replace(each, tokens_per_second=0) for each in there.answers
    ]
    assert here.answers[0].tokens == 12


@pytest.mark.parametrize(
    ("mix", "text"),
    [
        (Mix("captain", {"alpaca": 0.5, "pirate": 1.25}), "captain · alpaca 0.5 · pirate 1.25"),
        (Mix(None, {"alpaca": -0.7, "pirate": 0}), "alpaca -0.7"),
        (Mix(None, {}), "base model alone"),
        (Mix("plain", {}), "plain · base model alone"),
        (Mix("voted", {"alpaca": 1}, "ties"), "voted (ties) · alpaca 1"),
    ],
)
def test_a_blend_in_words(mix: Mix, text: str) -> None:
    assert mix_text(mix) == text


def test_second_up_is_refused(folder: Path) -> None:
    with as_running(folder / "model-compose.yml", "http://127.0.0.1:9"):
        for command in (("up",), ("up", "-d"), ("start",)):
            assert called(*command, cwd=folder) == (
                1, "", "❌ model-compose.yml is up already at http://127.0.0.1:9; `model-compose down` ends it\n",
            )  # fmt: skip


def test_run_that_fails_prints_nothing_to_stdout(project: Path) -> None:
    cwd = project.parent
    path = cwd / "failing.yml"
    path.write_text(tiny.YAML.replace('"${output}"', '"${output as integer}"'), encoding="utf-8")
    with serving(path) as url, as_running(path, url):
        code, out, err = called("run", "-f", "failing.yml", "--input", INPUT, cwd=cwd)
    assert (code, out) == (1, "")
    assert err.startswith("❌ ${output as integer}: ")
    assert "is not an integer" in err
    assert "Traceback" not in err


def test_service_of_another_version_of_the_file_is_not_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "model-compose.yml"
    with as_running(path, "http://127.0.0.1:9"):
        assert service(load([path], {})) is not None
        path.write_text(tiny.YAML.replace("weight: 0.7", "weight: 1.7"), encoding="utf-8")
        assert service(load([path], {})) is None
    assert capsys.readouterr().err.startswith(
        "the running service was started from another version of this file (or of"
    )


def test_several_streamed_texts_follow_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    printer = Printer()
    for path, text in (("a", "one "), ("b", "three "), ("a", "two"), ("b", "four")):
        printer(path, text)
    printer.finish({"a": "one two", "b": "three four"})
    assert capsys.readouterr().out == "one two\n\nthree four\n"


@pytest.mark.parametrize(
    ("result", "expected"), [({"n": 3}, '{\n  "n": 3\n}\n'), ({"text": ""}, "\n"), ("", "\n"), (None, "\n")]
)
def test_result_without_a_streamed_text(result: Any, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    Printer().finish(result)
    assert capsys.readouterr().out == expected


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_keep_to_stderr_and_go_away(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with bars() as report:
        report(Progress("downloading org/[model]", 1_000_000, 3_000_000))
        report(Progress("loading weights", 2, 20, "tensors"))
        sys.stdout.write("a res")
    shown = terminal.getvalue()
    assert "downloading org/[model]" in shown
    assert "1 of 3 MB" in shown
    assert "2/20" in shown
    sys.stdout.write("ult")
    assert capsys.readouterr().out == "a result"
    assert terminal.getvalue() == shown


@pytest.mark.parametrize("columns", ["40", "60", "120"])
def test_bars_stay_within_a_line_and_show_the_count(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with bars() as report:
        report(Progress("converting and de-quantizing all the tensors of this file", 20, 272, "tensors"))
    lines = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n").splitlines()
    assert any("20/272" in line for line in lines)
    assert max(map(len, lines)) <= int(columns)


def test_nothing_is_shown_of_progress_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with bars() as report:
        report(Progress("loading", 1, 2))
    assert capsys.readouterr() == ("", "")


def test_service_that_does_not_answer(folder: Path) -> None:
    with as_running(folder / "model-compose.yml", "http://127.0.0.1:9"):
        code, out, err = called("run", "--input", INPUT, cwd=folder)
        assert (code, out) == (1, "")
        assert err.startswith("❌ the service at http://127.0.0.1:9 stopped answering (")


# Processes that load models: few, for each takes seconds.

SERVED = tiny.YAML.replace("max_output_length: 12", "max_output_length: 12\n    min_output_length: 12")


@pytest.mark.slow
def test_up_run_down(project: Path) -> None:
    """`up -d` starts although a killed service left its record; the answers equal those in process; `down` ends it."""
    cwd = project.parent
    path = cwd / "served.yml"
    path.write_text(SERVED, encoding="utf-8")
    file = ("-f", "served.yml")
    in_process = cli(*file, "run", "--input", INPUT, cwd=cwd)
    assert in_process[::2] == (0, CUT)

    loaded = load([path], {})
    with hold(loaded.files, loaded.config):
        (record,) = state_dir().glob("*.json")
        stale = record.read_text()
    record.write_text(stale)  # as kill -9 leaves it
    code, out, err = cli("up", "-dv", *file, cwd=cwd)
    try:
        assert code == 0, err
        url, *rest = out.splitlines()
        assert rest == []
        assert url.startswith("http://127.0.0.1:")
        assert url.endswith("/api")
        found = find((path,))
        assert found is not None
        assert err.startswith(f"up as process {found.pid}, log in {state_dir()}")
        assert cli("run", *file, "--input", INPUT, cwd=cwd) == in_process
        assert cli(*file, "down", cwd=cwd) == (0, "", "stopped\n")
        assert cli(*file, "down", cwd=cwd) == (0, "", "served.yml is not up\n")
    finally:
        if (found := find((path,))) is not None:
            os.kill(found.pid, signal.SIGKILL)


def test_what_cannot_be_loaded_is_told_by_every_command(project: Path) -> None:
    cwd = project.parent
    (cwd / "missing.yml").write_text(tiny.YAML.replace("./pirate", "./priate"), encoding="utf-8")
    expected = (
        "❌ missing.yml:15: component.peft_adapters.1.model: adapter 'pirate': There is no file or folder "
        f"{cwd / 'priate'} ('./priate' counted from {cwd}): correct the path.\n"
    )
    assert called("validate", "-f", "missing.yml", cwd=cwd) == (1, "", expected)
    assert called("plan", "-f", "missing.yml", cwd=cwd) == (1, "", expected)
    assert called("run", "-f", "missing.yml", "--input", INPUT, cwd=cwd) == (1, "", expected)
    assert called("up", "-f", "missing.yml", cwd=cwd) == (1, "", expected)
    assert called("up", "-d", "-f", "missing.yml", cwd=cwd) == (1, "", expected)


def test_what_is_seen_only_while_loading_is_told_by_run_and_by_up(project: Path) -> None:
    cwd = project.parent
    (cwd / "card.yml").write_text(tiny.YAML.replace("precision: float32", "device: cuda:7"), encoding="utf-8")
    code, out, err = called("run", "-f", "card.yml", "--input", INPUT, cwd=cwd)
    assert (code, out) == (1, "")
    assert err.startswith("❌ device 'cuda:7' does not exist on this machine")
    code, out, up = cli("up", "-d", "-f", "card.yml", cwd=cwd)
    assert (code, out) == (1, "")
    assert up.startswith(f"{err}(the service did not start; its log: ")


@pytest.fixture(scope="session")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a project whose texts take minutes."""
    folder = tmp_path_factory.mktemp("endless")
    base = tiny.save_base(folder / "base", tiny.llama_config(max_position_embeddings=100_000))
    tiny.save_adapter(folder / "alpaca", base, std=0.5)
    text = tiny.YAML.replace("    - {type: lora, name: pirate, model: ./pirate, weight: 0.8}\n", "")
    text = text.replace("max_output_length: 12", "max_output_length: 99000\n    min_output_length: 99000")
    (folder / "model-compose.yml").write_text(text, encoding="utf-8")
    return folder


def interrupted(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """Sends Ctrl+C. Returns the exit code and stderr. Raises TimeoutExpired if the process does not end."""
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=SECONDS)
    return process.returncode, err


def test_interrupt_while_generating(endless: Path) -> None:
    with start("run", "--input", INPUT, "--stream", cwd=endless) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        assert interrupted(process) == (130, "interrupted\n")


def test_interrupt_while_loading(endless: Path) -> None:
    with start("run", "--input", INPUT, cwd=endless) as process:
        libraries = Path(f"/proc/{process.pid}/maps")
        wait_until(lambda: "libtorch" in libraries.read_text(encoding="utf-8"), "importing torch")
        assert interrupted(process) == (130, "interrupted\n")
