"""How texts ended, as every answer tells it: cut, or empty and why."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from model_compose.components.notes import notes
from model_compose.compose import Compose
from model_compose.generation import Finish, Sampling, Usage
from tests import tiny

YAML = """\
workflows:
  - {id: raw, default: true, job: {}}
  - {id: stopped, job: {action: stopped}}
  - {id: many, job: {action: many}}
  - {id: chat, job: {component: chat}}
  - id: chain
    jobs: [{id: one, action: raw}, {id: two, component: plain, depends_on: [one]}]
    output: ["${jobs.one.output}", "${jobs.two.output}"]
components:
  - id: raw
    type: model
    task: text-generation
    model: ./base
    precision: float32
    default: true
    options: {max_context: 12}
    actions:
      - {id: raw, default: true, prompt: "${input.prompt}", max_output_length: "${input.most as integer}"}
      - {id: stopped, prompt: "${input.prompt}", stop_sequences: [bc]}
      - {id: many, prompt: "${input.prompts as list}", max_output_length: 1}
  - {id: chat, type: model, task: chat-completion, model: ./base, precision: float32, action: {messages: "${input.turns}"}}
  - {id: plain, type: model, task: text-generation, model: ./plain, precision: float32, action: {prompt: "${input.prompt}"}}
"""
AT_ONCE = "the text is empty: the model ended at once"
CONTEXT = "the text was cut at the end of the model's context"
TEMPLATE = (
    "the text is empty: the model ended at once. The base has a chat template, which a raw prompt does not use: set task: "
    "chat-completion, or write the prompt in the template that the base or an adapter was trained with"
)


def save_ending(folder: Path, *, chat: bool) -> None:
    """A base that writes abcd over and over, but ends after z and after >, with which a chat's prompt ends."""
    base = tiny.save_base(folder, chat=chat)
    tiny.teach_to_say(base, "abcdz>")
    model = AutoModelForCausalLM.from_pretrained(base)
    head = model.lm_head.weight.data
    head[:, 3:6] = 0.0
    head[tiny.tokenizer()("a")["input_ids"][0], 3] = 1.0  # after d
    head[tiny.EOS, 4:6] = 1.0  # after z and >
    model.save_pretrained(base)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ending")
    save_ending(folder / "base", chat=True)
    save_ending(folder / "plain", chat=False)
    (folder / "model-compose.yml").write_text(YAML, encoding="utf-8")
    return folder / "model-compose.yml"


@pytest.mark.parametrize(
    ("workflow", "input", "output", "finish", "said"),
    [
        ("raw", {"prompt": "a", "most": 3}, "bcd", "length", ["the text was cut at max_output_length (3 tokens)"]),
        ("raw", {"prompt": "a"}, "bcdabcdabcd", "length", [CONTEXT]),
        ("raw", {"prompt": "a", "most": 50}, "bcdabcdabcd", "length", [CONTEXT]),
        ("raw", {"prompt": "z"}, "", "stop", [TEMPLATE]),
        ("chat", {"turns": [{"role": "user", "content": "Hi"}]}, "", "stop", [AT_ONCE]),
        ("stopped", {"prompt": "d"}, "a", "stop", []),
        ("stopped", {"prompt": "a"}, "", "stop", [
            "the text is empty: a stop sequence came first, or the model ended at once",
        ]),
        ("many", {"prompts": ["z", "a", "b"]}, ["", "b", "c"], ("stop", "length", "length"), [
            "2 of 3 texts were cut at max_output_length (1 token) or the end of the model's context",
            TEMPLATE.replace("the text is", "1 of 3 texts is"),
        ]),
    ],
)  # fmt: skip
async def test_an_answer_tells_how_its_texts_ended(
    path: Path, workflow: str, input: Any, output: Any, finish: Any, said: list[str]
) -> None:
    async with Compose.open(path) as compose:
        done = await compose.answer(input, workflow=workflow)
    assert (done.output, done.answers[0].finish_reason, done.notes) == (output, finish, said)


async def test_of_several_models_each_note_says_whose_text_it_is(path: Path) -> None:
    async with Compose.open(path) as compose:
        done = await compose.answer({"prompt": "z", "most": 1}, workflow="chain")
    assert done.notes == [f"raw: {TEMPLATE}", f"plain: {AT_ONCE}"]


@pytest.mark.parametrize(
    ("texts", "finishes", "made", "said"),
    [
        (["a"], ["stop"], 1, ()),
        ([" \n"], ["stop"], 2, (AT_ONCE,)),
        ([""], ["length"], 4, ("the text was cut at max_output_length (4 tokens)",)),  # half a character, say
    ],
)
def test_what_counts_as_empty(texts: list[str], finishes: list[Finish], made: int, said: tuple[str, ...]) -> None:
    usage = Usage(completion_tokens=made)
    assert notes(texts, finishes, Sampling(max_output_length=4), usage, past_template=False) == said
