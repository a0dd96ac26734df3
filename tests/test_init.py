"""`init`: every template loads and runs, and nothing is overwritten that a person has not said."""

import shlex
from pathlib import Path

import pytest

from model_compose import templates
from model_compose.compose import Compose
from model_compose.errors import SourceError
from model_compose.loading import load
from tests.test_cli import called

RUN_AS_THEY_ARE = [name for name in templates.names() if name != "adapters"]
"""The others name weights that only their users have."""


def initialised(folder: Path, template: str) -> Path:
    assert called("init", template, cwd=folder)[:2] == (0, "model-compose.yml\n")
    return folder / "model-compose.yml"


@pytest.mark.parametrize("name", templates.names())
def test_a_template_loads_and_its_next_steps_are_commands(name: str, tmp_path: Path) -> None:
    path = initialised(tmp_path, name)
    config = load([path], {"API_KEY": "k"}).config
    assert path.read_text(encoding="utf-8") == templates.read(name).text
    assert len(templates.read(name).summary) <= 110
    for model in config.all_components:
        folders = [each.model.path for each in getattr(model, "peft_adapters", ()) if hasattr(each.model, "path")]
        assert name == "adapters" or all((tmp_path / folder / "adapter_config.json").is_file() for folder in folders)
    steps = templates.read(name).next_steps(path)
    commands = [shlex.split(step) for step in steps if step.startswith("model-compose ")]
    assert commands
    for _, *arguments in commands:
        assert called(*arguments, "--help", cwd=tmp_path)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN_AS_THEY_ARE)
async def test_a_template_runs(name: str, tmp_path: Path) -> None:
    path = initialised(tmp_path, name)
    question = "What is the capital of France?"
    chats = "task: chat-completion" in templates.read(name).text
    short = tmp_path / "short.yml"
    short.write_text("component: {action: {max_output_length: 4}}")
    value = {"messages": [{"role": "user", "content": question}]} if chats else {"prompt": question}
    try:
        async with Compose.open([path, short], env={"API_KEY": "k"}) as compose:
            done = await compose.answer(value)
    except SourceError as error:
        pytest.skip(f"the package that holds the weights cannot be had: {error}")
    assert done.output.strip()
    assert done.answers[0].blend.active


async def test_the_template_for_own_adapters_runs_on_own_adapters(project: Path, tmp_path: Path) -> None:
    path, folder = initialised(tmp_path, "adapters"), project.parent
    text = path.read_text(encoding="utf-8")
    for written, own in (
        ("HuggingFaceTB/SmolLM2-135M-Instruct", f"{folder}/base"), ("./adapters/mine", f"{folder}/alpaca"),
        ("org/name,", f"{folder}/pirate,"),
    ):  # fmt: skip
        assert text.count(f"model: {written}") == 1
        text = text.replace(f"model: {written}", f"model: {own}")
    path.write_text(text.replace("max_output_length: 200", "max_output_length: 5"), encoding="utf-8")
    async with Compose.open(path) as compose:
        done = await compose.answer({"prompt": "Once"}, blend="half")
    assert done.answers[0].blend.weights == {"mine": 0.5, "other": 0.5}


def test_the_default_and_another_file(tmp_path: Path) -> None:
    code, out, err = called("init", cwd=tmp_path)
    assert (code, out) == (0, "model-compose.yml\n")
    assert err.splitlines()[:4] == [
        "adapters/alpaca copied",
        "adapters/pirate copied",
        "next:",
        "  model-compose run --input 'Why is the sky blue?' --stream",
    ]
    assert called("validate", cwd=tmp_path)[0] == 0
    (tmp_path / "sub folder").mkdir()
    code, out, err = called("init", "chat", "-o", "sub folder/my chat.yml", cwd=tmp_path)
    assert (code, out) == (0, "sub folder/my chat.yml\n")
    assert "\n  model-compose -f 'sub folder/my chat.yml' run " in err
    assert "\n#   model-compose -f 'my chat.yml' run " in (tmp_path / out.strip()).read_text(encoding="utf-8")
    assert {path.name for path in (tmp_path / "sub folder").iterdir()} == {"my chat.yml", "adapters"}


@pytest.mark.parametrize("name", ["model-compose.yml", "model-compose.yaml"])
def test_nothing_is_overwritten_unless_forced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    (tmp_path / "adapters" / "pirate").mkdir(parents=True)
    (tmp_path / "adapters" / "pirate" / "own").touch()
    code, out, err = called("init", cwd=tmp_path)
    expected = f"❌ {name} exists; name another file with --output, or overwrite it with --force\n"
    assert (code, out, err) == (1, "", expected)
    assert (tmp_path / name).read_text() == "mine"
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == {"pirate"}
    code, out, err = called("init", "--force", cwd=tmp_path)
    assert (code, out) == (0, "model-compose.yml\n")
    assert "adapters/pirate exists, so it is kept\n" in err
    assert [path.name for path in (tmp_path / "adapters" / "pirate").iterdir()] == ["own"]
    assert (tmp_path / "model-compose.yml").read_text(encoding="utf-8") == templates.read("blend").text


def test_what_fails_leaves_nothing_half_written(tmp_path: Path) -> None:
    (tmp_path / "adapters").touch()  # where the folder should go
    code, out, err = called("init", cwd=tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("❌ --output: model-compose.yml cannot be written (")
    assert [path.name for path in tmp_path.iterdir()] == ["adapters"]
    for option, complaint in (("no/x.yml", "no folder no"), (".", ". is a folder")):
        assert called("init", "-o", option, cwd=tmp_path) == (1, "", f"❌ --output: {complaint}\n")


def test_the_list_and_an_unknown_name(tmp_path: Path) -> None:
    code, out, err = called("init", "--list", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == templates.names()
    assert templates.names()[0] == templates.DEFAULT
    code, out, err = called("init", "chta", cwd=tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith("❌ there is no template 'chta'; did you mean 'chat'? known: blend, ")
    assert not list(tmp_path.iterdir())
