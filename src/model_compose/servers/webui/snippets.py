"""Calls that do the same as a run of the page: curl for the workflow API, Python for OpenAI, YAML for a blend."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from model_compose.components import Answer, pick
from model_compose.components.model_actions import SamplingOverrides
from model_compose.components.response_format import on_the_wire
from model_compose.compose import Compose
from model_compose.generation import Message, Sampling
from model_compose.schema import public_name
from model_compose.workflow.jobs import WorkflowOptions

KEY = "MODEL_COMPOSE_API_KEY"


@dataclass(frozen=True)
class Call:
    """What a finished run was asked, and which models answered it."""

    workflow: WorkflowOptions
    input: Any
    answers: tuple[Answer, ...]
    sampling: SamplingOverrides | None = None


def all_of(compose: Compose, api_address: str, call: Call) -> list[dict[str, str]]:
    """Every snippet for the run, with its title."""
    shown = {
        "curl": curl(compose, api_address, call),
        "Python, with the openai package": openai(compose, api_address, call),
        "YAML, to keep this blend in the file": named_blend(compose, call.answers),
    }
    return [{"title": title, "code": code} for title, code in shown.items() if code is not None]


def curl(compose: Compose, api_address: str, call: Call) -> str:
    """A shell command that posts the same run."""
    server = compose.config.serving.server
    assert server is not None
    body: dict[str, Any] = {"input": call.input}
    if len(compose.config.all_workflows) > 1:
        body = {"workflow_id": call.workflow.id, **body}
    blend = _blend(compose, call.answers)
    if blend is not None:
        body["blend"] = blend
    if call.sampling is not None:
        body["sampling"] = call.sampling.model_dump(exclude_none=True)
    lines = [f"curl {api_address}{server.base_path}/workflows/runs", "-H 'Content-Type: application/json'"]
    if server.api_keys:
        lines.append(f'-H "Authorization: Bearer ${KEY}"')
    entries = ",\n".join(f'    "{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in body.items())
    lines.append("-d " + shlex.quote("{\n" + entries + "\n  }"))
    return " \\\n  ".join(lines)


def openai(compose: Compose, api_address: str, call: Call) -> str | None:
    """Python that gets the same text by OpenAI's client; None if that takes more than one call to one model."""
    jobs = call.workflow.all_jobs
    if len(jobs) != 1 or len(call.answers) != 1:
        return None
    answer = call.answers[0]
    model = compose.models[pick(compose.config.all_components, jobs[0].component, "component").id]
    value = jobs[0].input_template.evaluate({"input": call.input, "context": {}, "jobs": {}})
    asked = model.evaluate(model.options.find_action(jobs[0].action), {"input": value, "context": {}})
    prompts = asked.prompts()
    if len(prompts) != 1:
        return None
    route, prompt, shown = _asking(prompts[0])
    drawn = asked.sampling if call.sampling is None else call.sampling.over(asked.sampling)
    plain, extra = _sampling(drawn, model.sampling())
    lora = [{"name": name, "scale": weight} for name, weight in answer.blend.weights.items() if weight]
    id = public_name(answer.component)
    if answer.blend.method is not None:  # `lora` would be the sum
        id += f":{answer.blend.name}"
    elif model.blends.adapters:
        extra = {"lora": lora, **extra}
    arguments = {"model": id, **prompt, **plain, **({"extra_body": extra} if extra else {})}
    needs_key = compose.config.serving.server is not None and bool(compose.config.serving.server.api_keys)
    key = f'os.environ["{KEY}"]' if needs_key else '"none"'
    return "\n".join(
        [
            *(["import os", ""] if needs_key else []),
            "from openai import OpenAI",
            "",
            f'client = OpenAI(base_url="{api_address}/v1", api_key={key})',
            f"answer = client.{route}.create(",
            *(f"    {name}={_literal(value)}," for name, value in arguments.items()),
            ")",
            "for choice in answer.choices:"
            if asked.sampling.num_return_sequences > 1
            else f"print(answer.choices[0].{shown})",
            *([f"    print(choice.{shown})"] if asked.sampling.num_return_sequences > 1 else []),
        ]
    )


def named_blend(compose: Compose, answers: tuple[Answer, ...]) -> str | None:
    """YAML that gives the answer's blend a name, to add to the component; None if the blend has a name in the file, or if
    several models answered."""
    if (
        len(answers) != 1
        or answers[0].blend.name is not None
        or not compose.models[answers[0].component].blends.adapters
    ):
        return None
    weights = {name: weight for name, weight in answers[0].blend.weights.items() if weight}
    return yaml.safe_dump(
        {"blends": {"my-blend": weights}}, sort_keys=False, default_flow_style=None, allow_unicode=True
    )


def _asking(prompt: str | tuple[Message, ...]) -> tuple[str, dict[str, Any], str]:
    """The client's method, its argument for the prompt, and the attribute of a choice that holds the text."""
    if isinstance(prompt, str):
        return "completions", {"prompt": prompt}, "text"
    messages = [{"role": turn.role, "content": turn.content} for turn in prompt]
    return "chat.completions", {"messages": messages}, "message.content"


def _sampling(used: Sampling, default: Sampling) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sampling that differs from the server's defaults, as the client's own arguments and as those for `extra_body`."""
    drawn = (used.do_sample, used.temperature if used.do_sample else 0.0)
    usual = (default.do_sample, default.temperature if default.do_sample else 0.0)
    plain = {
        "max_tokens": used.max_output_length if used.max_output_length != default.max_output_length else None,
        "temperature": drawn[1] if drawn != usual else None,
        "top_p": used.top_p if used.top_p != default.top_p else None,
        "seed": used.seed if used.seed != default.seed else None,
        "stop": list(used.stop_sequences) if used.stop_sequences != default.stop_sequences else None,
        "presence_penalty": used.presence_penalty if used.presence_penalty != default.presence_penalty else None,
        "frequency_penalty": used.frequency_penalty if used.frequency_penalty != default.frequency_penalty else None,
        "logit_bias": {str(token): bias for token, bias in used.logit_bias}
        if used.logit_bias != default.logit_bias
        else None,
        "n": used.num_return_sequences if used.num_return_sequences > 1 else None,
    }
    extra = {
        "top_k": used.top_k if used.top_k != default.top_k else None,
        "min_p": used.min_p if used.min_p != default.min_p else None,
        "repetition_penalty": used.repetition_penalty
        if used.repetition_penalty != default.repetition_penalty
        else None,
        # The client's completions know no response_format of their own, only its chats do.
        "response_format": None if used.response_format is None else on_the_wire(used.response_format),
    }
    return _given(plain), _given(extra)


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _blend(compose: Compose, answers: tuple[Answer, ...]) -> Any:
    """The `blend` of a request that gives the answers' blends; None if no single value does, or no model has adapters."""
    used: dict[str, Any] = {}
    for answer in answers:
        blends = compose.models[answer.component].blends
        name = answer.blend.name
        named = name is not None and blends.named.get(name) == answer.blend
        said = name if named else {name: weight for name, weight in answer.blend.weights.items() if weight}
        if not blends.adapters:
            continue
        if used.setdefault(answer.component, said) != said:
            return None
    if len(compose.models) > 1:
        return used or None
    return next(iter(used.values()), None)


def _literal(value: Any) -> str:
    """A Python literal in double quotes, as people write it."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return repr(value)
