"""One run of a workflow, in this process or on the service that is already up. The answer is the same."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, aclosing
from typing import Any, NamedTuple

from model_compose.components import Answer
from model_compose.compose import Compose
from model_compose.errors import ComposeError, FieldError, InputError, RunError
from model_compose.loading import ComposeFile
from model_compose.progress import Report
from model_compose.running import Mix, Record
from model_compose.schema import public_name
from model_compose.terminal import Answered
from model_compose.workflow.runner import Done

Show = Callable[[str, str], None]
"""Takes a path of the output and the next piece of the text there."""


class Ran(NamedTuple):
    """A finished run. notes: what a person should know about its texts. answers: of a service, only where one model
    answered."""

    output: Any
    notes: Collection[str]
    answers: list[Answered]


async def run_here(
    loaded: ComposeFile,
    value: Any,
    workflow: str | None,
    blend: Any,
    show: Show | None,
    loading: AbstractContextManager[Report],
) -> Ran:
    """Loads the models, runs the workflow, and closes the models. `show` gets the text while it is made.

    loading: is open while the models load, and closed before any text is shown, since bars and text do not mix.
    """
    compose = Compose(loaded)
    prepared = compose.prepare(value, workflow=workflow, blend=blend)  # before minutes of loading
    try:
        with loading as report:
            await compose.load(report)
        async with aclosing(compose.execute(prepared)) as events:
            async for event in events:
                if isinstance(event, Done):
                    return Ran(event.output, event.notes, _answered(event.answers))
                if show:
                    show(".".join(map(str, event.path)), event.text)
    finally:
        await compose.close()
    raise AssertionError("a run ends with Done")


def _answered(answers: Collection[Answer]) -> list[Answered]:
    return [
        Answered(
            Mix.of(each.blend), each.usage.completion_tokens, each.usage.tokens_per_second,
            [each.finish_reason] if isinstance(each.finish_reason, str) else each.finish_reason,
            public_name(each.component) if len(answers) > 1 else None,
        )
        for each in answers
    ]  # fmt: skip


def run_there(
    record: Record, loaded: ComposeFile, value: Any, workflow: str | None, blend: Any, show: Show | None
) -> Ran:
    """Asks the running service. Raises RunError or InputError with the service's own words."""
    import httpx

    server = loaded.config.serving.server
    keys = server.api_keys if server else None
    headers = {"Authorization": f"Bearer {keys[0].get_secret_value()}"} if keys else {}
    body = {"workflow_id": workflow, "input": value, "blend": blend, "stream": show is not None}
    url = f"{record.api}{record.base_path}/workflows/runs"
    try:
        with (
            httpx.Client(timeout=None, trust_env=False) as client,
            client.stream("POST", url, json=body, headers=headers) as response,
        ):
            if response.headers.get("content-type", "").startswith("text/event-stream"):
                return _follow(_lines(response.iter_bytes()), show)
            answer = json.loads(response.read())
    except (httpx.HTTPError, ValueError) as error:
        raise RunError(f"the service at {record.api} stopped answering ({error})") from error
    if response.status_code != 200:
        raise _error(answer)
    return _ran(answer)


def _lines(chunks: Iterator[bytes]) -> Iterator[str]:
    """Splits at newlines alone. httpx would also split at U+2028 and its kind, which JSON may hold."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode() for line in lines)


def _follow(lines: Iterator[str], show: Show | None) -> Ran:
    """Reads the event stream: delta, then done or error."""
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = json.loads(line.removeprefix("data: "))
            if name == "done":
                return _ran(data)
            if name == "error":
                raise _error(data)
            if show:
                show(data["path"], data["text"])
    raise RunError("the service closed the connection before the end")


def _ran(answer: Mapping[str, Any]) -> Ran:
    finish, usage, blend = answer.get("finish_reason"), answer.get("usage"), answer.get("blend")
    answers = []
    if finish and usage and blend:
        mix = Mix(blend["name"], blend["weights"], blend.get("method"))
        finishes = [finish] if isinstance(finish, str) else finish
        answers.append(Answered(mix, usage["completion_tokens"], usage["tokens_per_second"], finishes))
    return Ran(answer.get("output"), answer.get("notes", []), answers)


def _error(problem: Mapping[str, Any]) -> ComposeError:
    detail = problem.get("detail", "the service gave no reason")
    if problem.get("status", 500) >= 500:
        return RunError(detail)
    return InputError(detail, [FieldError(**field) for field in problem.get("errors", ())])
