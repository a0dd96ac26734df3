"""Everything that files on this machine tell is told before anything is fetched or loaded, at once, and without torch."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, MixtralConfig

from model_compose.compose import Compose
from model_compose.errors import AdapterError, ComposeError, InputError, LoadError, SourceError
from model_compose.loading import load
from model_compose.plan import plan
from model_compose.preflight import check_files
from tests import gguf_base, tiny
from tests.hub import Hub, running_hub

CHAT = """\
component:
  type: model
  task: chat-completion
  model: ./base
  action: {messages: [{role: user, content: "${input.prompt}"}]}
"""


@pytest.fixture
def app(tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny project's folder, which is the current one."""
    monkeypatch.chdir(shutil.copytree(project.parent, tmp_path / "app"))
    return tmp_path / "app"


def problems(app: Path, *, error: type[ComposeError] = ComposeError, files: tuple[str, ...] = ()) -> list[str]:
    """What is wrong, a line each. error: the class that is raised."""
    loaded = load([app / file for file in files or ("model-compose.yml",)], {})
    try:
        check_files(loaded)
    except error as caught:
        return str(caught).splitlines()
    return []


def edit(app: Path, old: str, new: str) -> None:
    path = app / "model-compose.yml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def put(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_right_says_nothing(app: Path) -> None:
    assert problems(app) == []


def test_everything_is_told_at_once_with_its_line(app: Path) -> None:
    edit(app, "./base", "./bose")
    edit(app, "./alpaca", "./alpacca")
    put(app / "pirate/adapter_config.json", use_dora=True)
    assert problems(app, error=SourceError) == [
        f"model-compose.yml:11: component.model: There is no file or folder {app}/bose ('./bose' counted from {app}): "
        "correct the path.",
        "model-compose.yml:14: component.peft_adapters.0.model: adapter 'alpaca': There is no file or folder "
        f"{app}/alpacca ('./alpacca' counted from {app}): correct the path.",
        "model-compose.yml:15: component.peft_adapters.1.model: adapter 'pirate': use_dora is true; DoRA rescales the "
        "merged weight, so its effect is not a weighted sum. Such an adapter is refused.",
    ]


def test_every_component_is_looked_at_and_later_files_name_themselves(app: Path) -> None:
    two = app / "two.yml"
    two.write_text(
        "components:\n"
        "  - {id: a, type: model, task: text-generation, model: ./none-a, action: {text: hello}}\n"
        "  - {id: b, type: model, task: text-generation, model: ./none-b, action: {text: hello}}\n"
        "workflow: {job: {component: a}}\n"
    )
    first, second = problems(app, files=("two.yml",))
    assert first.startswith(f"two.yml:2: components.0.model: There is no file or folder {app}/none-a")
    assert second.startswith(f"two.yml:3: components.1.model: There is no file or folder {app}/none-b")


# Adapters.


def test_an_adapter_of_another_shape(app: Path) -> None:
    other = tiny.save_base(app / "other", tiny.llama_config(hidden_size=64))
    shutil.rmtree(app / "alpaca")
    tiny.save_adapter(app / "alpaca", other)
    (problem,) = problems(app, error=AdapterError)
    assert problem == (
        "model-compose.yml:14: component.peft_adapters.0.model: adapter 'alpaca': model.layers.0.self_attn.q_proj has A "
        "(4, 64) and B (64, 4), which fit a module of 64 inputs and 64 outputs; the base's has 32 inputs and 32 outputs. "
        f"The adapter belongs to another base model ({other})."
    )


def test_an_adapter_for_layers_that_the_base_has_not_got(app: Path) -> None:
    other = tiny.save_base(app / "other", tiny.llama_config(num_hidden_layers=3))
    shutil.rmtree(app / "pirate")
    tiny.save_adapter(app / "pirate", other)
    (problem,) = problems(app, error=AdapterError)
    assert "adapter 'pirate': the base model has no module 'model.layers.2.self_attn." in problem


def test_adapters_that_headers_do_not_name_are_compared_with_the_model_itself(app: Path) -> None:
    """A tied head is in no checkpoint; GPT-2's matrices lie the other way round, and its names are without a prefix."""
    tied = tiny.save_base(app / "tied", tiny.llama_config(tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(tied / "model.safetensors")
    shutil.rmtree(app / "alpaca")
    tiny.save_adapter(app / "alpaca", tied, target_modules=["lm_head", "q_proj"])
    shutil.rmtree(app / "pirate")
    tiny.save_adapter(app / "pirate", tied, target_modules=["embed_tokens", "v_proj"])
    edit(app, "./base", "./tied")
    assert problems(app) == []
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=tiny.VOCABULARY, n_positions=256)
    gpt2 = tiny.save_base(app / "gpt2", config)
    stored = load_file(gpt2 / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    save_file(bare, gpt2 / "model.safetensors", metadata={"format": "pt"})
    for name in ("alpaca", "pirate"):
        shutil.rmtree(app / name)
        tiny.save_adapter(app / name, gpt2, target_modules=["c_attn", "c_proj"])
    edit(app, "./tied", "./gpt2")
    assert problems(app) == []
    shutil.rmtree(app / "pirate")
    tiny.save_adapter(app / "pirate", tied)
    (problem,) = problems(app, error=AdapterError)
    assert "adapter 'pirate': the base model has no module 'model.layers.0.self_attn." in problem


def test_adapters_of_experts_are_compared_with_the_model_itself(app: Path) -> None:
    """A checkpoint has each expert's matrices; transformers fuses them, and has no module of such a name."""
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=2, num_experts_per_tok=1, vocab_size=tiny.VOCABULARY,
    )  # fmt: skip
    base = tiny.save_base(app / "mixtral", config)
    stored = load_file(base / "model.safetensors")
    name = next(name for name in stored if ".experts.0.w1" in name)
    module = name.removesuffix(".weight")
    rows, columns = stored[name].shape
    factors = {"lora_A": torch.ones(4, columns), "lora_B": torch.ones(rows, 4)}
    save_file(
        {f"base_model.model.{module}.{side}.weight": factor for side, factor in factors.items()},
        app / "alpaca/adapter_model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    edit(app, "./base", "./mixtral")
    edit(app, "    - {type: lora, name: pirate, model: ./pirate, weight: 0.8}\n", "")
    (problem,) = problems(app, error=AdapterError)
    assert f"the base model has no module '{module}'" in problem


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.unlink(), "holds neither adapter_model.safetensors nor adapter_model.bin"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "adapter_model.safetensors is cut off: "),
        (lambda path: path.write_bytes(b"\xff" * 200), "adapter_model.safetensors is cut off, or is not a safetensors"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
         "adapter_model.safetensors is a git-lfs pointer, not the file itself: run `git lfs install` and `git lfs pull`"),
        (lambda path: (path.parent / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda path: (path.parent / "adapter_config.json").write_text("{"), "adapter_config.json is not valid JSON"),
    ],
)  # fmt: skip
def test_adapter_files_that_are_missing_or_damaged(app: Path, damage: Callable[[Path], object], expected: str) -> None:
    damage(app / "alpaca/adapter_model.safetensors")
    (problem,) = problems(app)
    assert problem.startswith("model-compose.yml:14: component.peft_adapters.0.model: adapter 'alpaca': ")
    assert expected in problem


def test_names_and_ranks_are_told_by_the_header(app: Path) -> None:
    weights = app / "alpaca/adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    save_file(
        {**tensors, name.removeprefix("base_model.model."): tensors[name] + 1}, weights, metadata={"format": "pt"}
    )
    rank = json.loads((app / "pirate/adapter_config.json").read_text())["r"]
    put(app / "pirate/adapter_config.json", r=rank + 1)
    twice, other_rank = problems(app, error=AdapterError)
    assert "are both the lora_A of" in twice
    assert f"has rank {rank} in its weights, but adapter_config.json says {rank + 1}" in other_rank


def test_a_pickled_adapter_is_left_to_whoever_reads_it(app: Path) -> None:
    weights = app / "alpaca/adapter_model.safetensors"
    torch.save(load_file(weights), app / "alpaca/adapter_model.bin")
    weights.unlink()
    assert problems(app) == []


# Bases.


def shard(base: Path) -> Path:
    """Stores the weights in two files with an index. Returns the second."""
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    shards = {f"model-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
    for file, inside in shards.items():
        save_file({name: tensors[name] for name in inside}, base / file, metadata={"format": "pt"})
    weight_map = {name: file for file, inside in shards.items() for name in inside}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (base / "model.safetensors").unlink()
    return base / "model-00002-of-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda base: (base / "model.safetensors").unlink(), "has a config but no weights"),
        (lambda base: (base / "config.json").unlink(), "has no config.json; is it the folder of a model"),
        (lambda base: (base / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda base: (base / "config.json").write_text("[]"), "config.json does not hold a JSON object"),
        (lambda base: [file.unlink() for file in base.glob("tokenizer*")], "has no tokenizer"),
        (lambda base: (base / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
         "model.safetensors is a git-lfs pointer"),
        (lambda base: (base / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
         "tokenizer.json is a git-lfs pointer"),
        (lambda base: (base / "model.safetensors").write_bytes(
            b"\x41\0\0\0\0\0\0\0" + b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,Infinity]}}'.ljust(65) + b"1234"),
         "model.safetensors is damaged, or is not a safetensors file"),
        (lambda base: shard(base).unlink(),
         "base has no model-00002-of-00002.safetensors, which model.safetensors.index.json lists; download it too"),
    ],
)  # fmt: skip
def test_base_files_that_are_missing_or_damaged(app: Path, damage: Callable[[Path], object], expected: str) -> None:
    damage(app / "base")
    (problem,) = problems(app)
    assert problem.startswith("model-compose.yml:11: component.model: ")
    assert expected in problem


def test_shards_and_pickles_are_weights(app: Path) -> None:
    shard(app / "base")
    assert problems(app) == []
    edit(app, "./pirate", "./alpaca")
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted((app / "base").glob("model-*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    (app / "base/model.safetensors.index.json").unlink()
    torch.save(tensors, app / "base/pytorch_model.bin")
    assert problems(app) == []


def test_an_adapter_in_the_place_of_the_base(app: Path) -> None:
    edit(app, "./base", "./pirate")
    assert "./pirate is an adapter, not a base model; list it under peft_adapters" in problems(app)[0]


def test_a_chat_task_needs_a_template(app: Path) -> None:
    (app / "model-compose.yml").write_text(CHAT)
    assert problems(app) == []
    template = (app / "base/chat_template.jinja").read_text()
    (app / "base/chat_template.jinja").unlink()
    (problem,) = problems(app, error=LoadError)
    assert problem.startswith(
        "model-compose.yml:4: component.model: ./base has no chat template, which task: chat-completion"
    )
    put(app / "base/tokenizer_config.json", chat_template=template)
    assert problems(app) == []
    put(app / "base/tokenizer_config.json", chat_template=[{"name": "default", "template": template}])
    assert problems(app) == []


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ([{"template": "y"}], "whose entries are not {name, template}"),
        ([{"name": [], "template": "y"}], "whose entries are not {name, template}"),
        (["x"], "whose entries are not {name, template}"),
        ([{"name": "default"}], "a chat_template that is not text"), ({"default": 1}, "a chat_template that is not text"),
        (7, "a chat_template that is not text"),
    ],
    ids=str,
)  # fmt: skip
def test_a_chat_template_that_is_none_hides_nothing_else(app: Path, template: object, words: str) -> None:
    (app / "model-compose.yml").write_text(CHAT + "  peft_adapters: [{type: lora, name: x, model: ./nowhere}]\n")
    (app / "base/chat_template.jinja").unlink()
    put(app / "base/tokenizer_config.json", chat_template=template)
    base, adapter = problems(app)
    assert base.startswith(f"model-compose.yml:4: component.model: {app / 'base/tokenizer_config.json'} has")
    assert words in base
    assert "./nowhere" in adapter


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/rag.jinja"])
def test_a_chat_template_in_another_encoding(app: Path, name: str) -> None:
    (app / "model-compose.yml").write_text(CHAT)
    (app / "base/additional_chat_templates").mkdir()
    (app / "base" / name).write_bytes(b"\xff\xfe\x00")
    (problem,) = problems(app, error=LoadError)
    assert f"{app / 'base' / name} is not UTF-8 text (invalid start byte at byte 0); download it again" in problem


def test_an_index_of_names_that_no_file_has(app: Path) -> None:
    (app / "base/model.safetensors").unlink()
    (app / "base/model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "y" * 300}}))
    (problem,) = problems(app, error=LoadError)
    assert "model.safetensors.index.json cannot be read (File name too long)" in problem


# GGUF.


@pytest.fixture
def gguf(app: Path) -> Path:
    """The project with its base as a GGUF file in a folder of its own, and nothing beside it."""
    (app / "models").mkdir()
    file = gguf_base.save_gguf(app / "base", app / "models/base.Q4.gguf")
    edit(app, "./base", "./models")
    return file


def test_adapters_are_compared_with_a_gguf(gguf: Path, app: Path) -> None:
    assert problems(app) == []
    shutil.rmtree(app / "alpaca")
    tiny.save_adapter(app / "alpaca", tiny.save_base(app / "other", tiny.llama_config(hidden_size=64)))
    (problem,) = problems(app, error=AdapterError)
    assert "fit a module of 64 inputs and 64 outputs; the base's has 32 inputs and 32 outputs" in problem
    shutil.rmtree(app / "alpaca")
    tiny.save_adapter(app / "alpaca", tiny.save_base(app / "deep", tiny.llama_config(num_hidden_layers=3)))
    (problem,) = problems(app, error=AdapterError)
    assert "the base model has no module 'model.layers.2.self_attn" in problem


def test_two_spellings_of_a_module_of_a_gguf(gguf: Path, app: Path) -> None:
    file = app / "alpaca/adapter_model.safetensors"
    tensors = load_file(file)
    around = {key.replace(".model.layers", ".language_model.model.layers"): tensor for key, tensor in tensors.items()}
    save_file(around, file)
    assert problems(app) == []
    save_file({**tensors, **{key: tensor.clone() for key, tensor in around.items()}}, file)
    (problem,) = problems(app, error=AdapterError)
    assert "are the same module 'model.layers." in problem


@pytest.mark.parametrize("size", [0, 3, 30, 3000])
def test_a_gguf_that_is_cut_off(gguf: Path, app: Path, size: int) -> None:
    gguf.write_bytes(gguf.read_bytes()[:size])
    (problem,) = problems(app, error=LoadError)
    assert problem.startswith(f"model-compose.yml:11: component.model: {gguf} is ")
    assert problem.endswith("download it again")


def test_what_a_driver_does_not_take(gguf: Path, app: Path) -> None:
    edit(app, "  model: ./models", "  driver: llamacpp\n  model: ./models")
    edit(app, "  precision: float32\n", "")
    assert problems(app) == []
    edit(app, "./models", "./base")
    (problem,) = problems(app, error=LoadError)
    assert problem.startswith(
        "model-compose.yml:12: component.model: ./base is a folder without a GGUF file, which driver: lla"
    )
    edit(app, "driver: llamacpp", "driver: vllm")
    assert problems(app) == []
    edit(app, "./base", "./models")
    (problem,) = problems(app, error=LoadError)
    assert "is a single file, but vllm takes a folder of safetensors" in problem


def test_the_parts_of_a_gguf(app: Path) -> None:
    (app / "models").mkdir()
    gguf_base.save_gguf(app / "base", app / "models/base.gguf", split=8)
    first, *_, last = sorted((app / "models").iterdir())
    edit(app, "./base", "./models")
    (problem,) = problems(app, error=LoadError)
    assert f"{first.name} is one of several parts" in problem
    edit(app, "  model: ./models", "  driver: llamacpp\n  model: ./models")
    edit(app, "  precision: float32\n", "")
    assert problems(app) == []
    last.unlink()
    (problem,) = problems(app, error=LoadError)
    assert f"there is no {last.name} beside it; download it too" in problem


def test_the_only_part_of_a_gguf_is_the_whole(app: Path) -> None:
    (app / "models").mkdir()
    gguf_base.save_gguf(app / "base", app / "models/base-00001-of-00001.gguf")
    edit(app, "./base", "./models")
    assert problems(app) == []


def test_a_chat_template_may_lie_beside_a_gguf(app: Path) -> None:
    (app / "models").mkdir()
    template = app / "base/chat_template.jinja"
    beside = template.rename(app / "models/chat_template.jinja")
    gguf_base.save_gguf(app / "base", app / "models/base.gguf")
    (app / "model-compose.yml").write_text(CHAT.replace("./base", "./models"))
    assert problems(app) == []
    beside.rename(template)
    (problem,) = problems(app, error=LoadError)
    assert "./models has no chat template" in problem
    gguf_base.save_gguf(app / "base", app / "models/base.gguf")  # with the template inside
    assert problems(app) == []


# What the YAML fixes.


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("response_format: {type: json_schema, json_schema: {schema: {type: strng}}}",
         "component.action.response_format: the response_format cannot be kept to: "),
        ("response_format: {type: json_schema, json_schema: {schema: {type: object, additionalProperties: no}}}",
         "component.action.response_format: the response_format cannot be kept to: schema must be an object or boolean"),
        ("response_format: {type: regex, regex: '(a'}",
         "component.action.response_format: the response_format cannot be kept to: "),
        ("params: {logit_bias: {999: 1}}",
         "component.action.params.logit_bias.999: logit_bias names the token 999, but this model has the tokens 0 to 257"),
    ],
)  # fmt: skip
def test_what_an_action_asks_for_in_vain(app: Path, given: str, expected: str) -> None:
    edit(app, "params: {do_sample: false}", given)
    (problem,) = problems(app, error=InputError)
    assert problem.startswith(f"model-compose.yml:23: {expected}")


@pytest.mark.parametrize(
    "given",
    [
        "response_format: {type: json_schema, json_schema: {schema: {type: object, properties: {a: {type: integer}}}}}",
        "response_format: {type: json_object}",
        "response_format: {type: text}",
        "response_format: '${input.format}'",
        "params: {logit_bias: {257: 1}}",
        "params: {logit_bias: '${input.bias}'}",
    ],
)
def test_what_can_be_kept_to(app: Path, given: str) -> None:
    edit(app, "params: {do_sample: false}", given)
    assert problems(app) == []


def test_devices_and_quantizations(app: Path) -> None:
    edit(app, "  precision: float32", "  device: gpu")
    edit(app, "./pirate, weight: 0.8", "./pirate, device: cuda0")
    assert problems(app, error=LoadError) == [
        "model-compose.yml:12: component.device: device 'gpu' is not known; use auto, cpu, cuda, cuda:0 or mps",
        "model-compose.yml:15: component.peft_adapters.1.device: device 'cuda0' is not known; use auto, cpu, cuda, "
        "cuda:0 or mps",
    ]
    edit(app, "device: gpu", "device: cpu\n  quantization: nf4")
    assert problems(app)[0] == (
        "model-compose.yml:13: component.quantization: quantization: nf4 is not available on cpu; on cpu use int8 or int4"
    )


def test_programs_that_are_not_there(app: Path, gguf: Path) -> None:
    edit(app, "  precision: float32", "  driver: llamacpp\n  options: {server: ./llama-server}")
    (problem,) = problems(app, error=LoadError)
    assert problem.startswith(
        "model-compose.yml:13: component.options.server: options.server: there is no ./llama-server that can"
    )
    edit(app, "driver: llamacpp\n  options: {server: ./llama-server}", "driver: vllm\n  options: {python: ./python}")
    edit(app, "./models", "./base")
    (problem,) = problems(app, error=LoadError)
    assert problem.startswith(
        f"model-compose.yml:13: component.options.python: options.python: there is no {app}/python; "
    )


def test_ranks_beyond_what_vllm_is_started_for(app: Path) -> None:
    put(app / "alpaca/adapter_config.json", r=8)
    tensors = load_file(app / "alpaca/adapter_model.safetensors")
    twice = {name: torch.cat([t, t], dim=int("lora_B" in name)) for name, t in tensors.items()}
    save_file(twice, app / "alpaca/adapter_model.safetensors", metadata={"format": "pt"})
    edit(app, "  precision: float32", "  driver: vllm\n  options: {max_lora_rank: 8}")
    assert problems(app) == []
    edit(app, "strong: {alpaca: 2.0}", "strong: {alpaca: 2.0, pirate: 1.0}\n    more: {alpaca: 1.0}")
    put(app / "pirate/adapter_config.json", target_modules=["q_proj"])
    shutil.copy(app / "alpaca/adapter_model.safetensors", app / "pirate/adapter_model.safetensors")
    put(app / "pirate/adapter_config.json", r=8)
    (problem,) = problems(app, error=LoadError)
    assert "has the rank 16 (alpaca 8 + pirate 8), but vllm was started for 8" in problem


# Before any network.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        hub.use(monkeypatch, tmp_path / "home")
        yield hub


async def test_local_files_are_looked_at_before_the_hub_is_asked(app: Path, hub: Hub) -> None:
    edit(app, "./alpaca", "someone/alpaca")
    assert problems(app) == []
    edit(app, "./base", "./bose")
    with pytest.raises(SourceError, match=r"component\.model: There is no file or folder"):
        async with Compose.open(app / "model-compose.yml", env={}):
            pass
    with pytest.raises(SourceError, match=r"component\.model: There is no file or folder"):
        plan(load([app / "model-compose.yml"], {}), {})
    assert hub.requests == []


def test_what_is_settled_in_the_cache_counts_as_local(app: Path, hub: Hub) -> None:
    edit(app, "./alpaca", "{repository: someone/alpaca, local_files_only: true}")
    (problem,) = problems(app, error=SourceError)
    assert "someone/alpaca is missing or incomplete in the cache" in problem
    assert hub.requests == []


def test_plan_is_content_with_configs(app: Path) -> None:
    for file in ("base/model.safetensors", "alpaca/adapter_model.safetensors", "base/tokenizer.json"):
        (app / file).unlink()
    loaded = load([app / "model-compose.yml"], {})
    check_files(loaded, weights=False)
    with pytest.raises(LoadError, match="has a config but no weights"):
        check_files(loaded)


def test_no_torch_is_imported_where_headers_tell(app: Path) -> None:
    (app / "models").mkdir()
    gguf_base.save_gguf(app / "base", app / "models/base.gguf")
    for base in ("./base", "./models"):
        (app / "this.yml").write_text(tiny.YAML.replace("./base", base))
        script = (
            "import sys\nfrom pathlib import Path\nfrom model_compose.loading import load\n"
            "from model_compose.preflight import check_files\ncheck_files(load([Path('this.yml').resolve()]))\n"
            "print(sorted(sys.modules.keys() & {'torch', 'transformers', 'peft', 'huggingface_hub'}))\n"
        )
        done = subprocess.run([sys.executable, "-c", script], cwd=app, capture_output=True, text=True, timeout=60)
        assert done.stdout == "[]\n", done
