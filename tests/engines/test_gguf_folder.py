"""A GGUF base in a folder: the files beside it count, and a folder that holds nothing else is that file."""

import json
import shutil
from pathlib import Path

import gguf
import pytest

from model_compose.compose import Compose
from model_compose.engines import on_disk
from model_compose.engines.tokenizer import load_tokenizer
from model_compose.errors import LoadError
from model_compose.headers import HeaderError, read_gguf
from model_compose.sources import Fetched
from tests import gguf_base, tiny

YAML = """\
component:
  type: model
  task: chat-completion
  model: ./models
  precision: float32
  options: {kv_cache: 1MB}
  action: {messages: [{role: user, content: "${input.prompt}"}], max_output_length: 4, params: {do_sample: false}}
"""
OTHER_TEMPLATE = "{% for m in messages %}[{{ m.content }}]{% endfor %}"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with a GGUF base that has no chat template, and with nothing else."""
    base = tiny.save_base(tmp_path / "base", chat=False)
    (tmp_path / "models").mkdir()
    gguf_base.save_gguf(base, tmp_path / "models/base.gguf")
    return tmp_path / "models"


def fetched(models: Path) -> Fetched:
    return Fetched(models, "base.gguf", "identity", "./models")


async def answer(models: Path) -> str:
    path = models.parent / "model-compose.yml"
    path.write_text(YAML)
    async with Compose.open(path, env={}) as compose:
        done = await compose.answer({"prompt": "Hello"})
    assert isinstance(done.output, str)
    return done.output


async def test_the_files_beside_a_gguf_count(models: Path) -> None:
    """The answer is that of the checkpoint, with the same tokenizer and template."""
    tiny.tokenizer().save_pretrained(models)
    said = await answer(models)
    shutil.rmtree(models)
    shutil.copytree(models.parent / "base", models)
    tiny.tokenizer().save_pretrained(models)
    assert await answer(models) == said != ""


async def test_a_template_alone_is_enough(models: Path) -> None:
    (models / "chat_template.jinja").write_text(tiny.CHAT_TEMPLATE)
    assert await answer(models) != ""


async def test_without_a_template_it_is_told_before_anything_is_loaded(models: Path) -> None:
    with pytest.raises(LoadError, match=r"model-compose\.yml:4: component\.model: \./models has no chat template"):
        await answer(models)


def test_a_tokenizer_beside_it_is_taken_where_it_has_the_same_tokens(models: Path) -> None:
    inside = load_tokenizer(fetched(models), trust_remote_code=False)
    assert len(inside) > tiny.VOCABULARY  # the file has one token more
    tiny.tokenizer(chat=False).save_pretrained(models)
    beside = load_tokenizer(fetched(models), trust_remote_code=False)
    assert len(beside) == tiny.VOCABULARY
    assert (beside.bos_token_id, beside.eos_token_id) == (inside.bos_token_id, inside.eos_token_id) == (0, 1)
    assert beside("Hello é")["input_ids"] == inside("Hello é")["input_ids"]
    (models / "tokenizer_config.json").unlink()
    bare = load_tokenizer(fetched(models), trust_remote_code=False)
    assert (len(bare), bare.bos_token_id, bare.eos_token_id) == (tiny.VOCABULARY, 0, 1)


def test_a_tokenizer_of_another_model_is_not_taken(models: Path) -> None:
    """transformers takes any tokenizer.json that lies there, whatever its tokens are."""
    inside = load_tokenizer(fetched(models), trust_remote_code=False)
    tiny.tokenizer(chat=False).save_pretrained(models)
    path = models / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))
    assert load_tokenizer(fetched(models), trust_remote_code=False)("ab")["input_ids"] == inside("ab")["input_ids"]


def test_the_template_beside_goes_before_the_one_inside(tmp_path: Path) -> None:
    base = tiny.save_base(tmp_path / "base")
    (tmp_path / "models").mkdir()
    gguf_base.save_gguf(base, tmp_path / "models/base.gguf")
    found = fetched(tmp_path / "models")
    assert load_tokenizer(found, trust_remote_code=False, chat=True).chat_template == tiny.CHAT_TEMPLATE
    (tmp_path / "models/chat_template.jinja").write_text(OTHER_TEMPLATE)
    assert load_tokenizer(found, trust_remote_code=False, chat=True).chat_template == OTHER_TEMPLATE


def test_the_header_is_what_the_gguf_package_reads(models: Path) -> None:
    header, reader = read_gguf(models / "base.gguf"), gguf.GGUFReader(models / "base.gguf")
    assert {name: stored.shape for name, stored in header.tensors.items()} == {
        tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors
    }
    for key, found in reader.fields.items():
        if not key.startswith("GGUF."):
            value = header.strings(key) if key in header.texts else header.fields[key]
            assert value == found.contents(), key
    assert set(header.fields) | set(header.texts) == {key for key in reader.fields if not key.startswith("GGUF.")}


def test_no_part_of_a_gguf_header_is_taken_for_a_whole(models: Path) -> None:
    """Wherever a file is cut off, or changed, it is an error of its own and no other."""
    file = models / "base.gguf"
    whole = file.read_bytes()
    end = whole.rindex(b"output_norm.weight")
    for size in range(0, end, 97):
        file.write_bytes(whole[:size])
        with pytest.raises(HeaderError):
            read_gguf(file)
    for at in range(4, end, 61):
        file.write_bytes(whole[:at] + b"\xff" * 8 + whole[at + 8 :])
        try:
            read_gguf(file)
        except HeaderError:
            continue


def test_templates_of_a_folder(tmp_path: Path) -> None:
    assert on_disk.template_beside(tmp_path) is None
    made = tiny.tokenizer()
    made.chat_template = {"default": tiny.CHAT_TEMPLATE, "rag": OTHER_TEMPLATE}
    made.save_pretrained(tmp_path)
    assert on_disk.template_beside(tmp_path) == made.chat_template
    made.save_pretrained(tmp_path / "old", save_jinja_files=False)
    assert on_disk.template_beside(tmp_path / "old") == made.chat_template
