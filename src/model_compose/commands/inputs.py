"""`--input` of `run`: where its text comes from, and which input of the workflow it is."""

import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model_compose.errors import InputError
from model_compose.expressions import Path as ValuePath
from model_compose.expressions import strict_json
from model_compose.workflow.variables import Variable, as_messages, inputs

if TYPE_CHECKING:
    from model_compose.loading import ComposeFile

SAMPLES: Mapping[str, Any] = {"integer": 1, "number": 0.5, "slider": 0.5, "boolean": True, "json": {}, "object": {}}


def read_text(given: str) -> str:
    """The text itself, the content of @FILE, or standard input for -. A newline at the end is dropped, as a shell does.

    Raises InputError.
    """
    if given == "-":
        return sys.stdin.read().rstrip("\r\n")
    if given.startswith("@"):
        try:
            return Path(given[1:]).read_text(encoding="utf-8-sig").rstrip("\r\n")
        except OSError as error:
            raise InputError(f"--input: {given[1:]} cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise InputError(f"--input: {given[1:]} is not UTF-8 text") from None
    return given


def read_input(text: str, loaded: "ComposeFile", workflow: str | None) -> Any:
    """The workflow's input. The text is JSON, or plain text for the one text input that the workflow requires.

    Raises NotFound, InputError.
    """
    asked = _asked(loaded, workflow)
    try:
        value = strict_json(text)
    except ValueError as error:
        if not text.strip() or text.lstrip().startswith(("{", "[")):
            problem = f"is not valid JSON: {error}" if text.strip() else "is empty"
            raise InputError(f"--input {problem}; example: {_example(asked)}") from None
        value = text
    if value is None or isinstance(value, dict | list) or any(not variable.path for variable in asked):
        return value
    texts = [variable for variable in asked if variable.required and _takes_text(variable)]
    if len(texts) != 1:
        raise InputError(
            f"--input is plain text, and this workflow has {len(texts) or 'no'} inputs that must be text; name them, for "
            f"example {_example(asked)}"
        )
    plain = value if isinstance(value, str) else text
    return _nested({texts[0].path: as_messages(plain) if texts[0].role == "messages" else plain})


def example(loaded: "ComposeFile", workflow: str | None) -> str:
    """An example of --input for this workflow."""
    return _example(_asked(loaded, workflow))


def _asked(loaded: "ComposeFile", workflow: str | None) -> list[Variable]:
    """The workflow's inputs without blends, which have an option of their own."""
    config = loaded.config
    return [each for each in inputs(config.find_workflow(workflow), config.all_components) if each.role != "blend"]


def _takes_text(variable: Variable) -> bool:
    named = all(isinstance(step, str) for step in variable.path)
    is_text = variable.type.name in ("string", "text", "markdown") and not variable.type.is_list
    return named and (is_text or variable.role == "messages")


def _example(asked: Collection[Variable]) -> str:
    """An example with the required inputs, or with all inputs if none is required."""
    shown = [variable for variable in asked if variable.required] or asked
    value = _nested({variable.path: _sample(variable) for variable in shown})
    return f"--input '{json.dumps(value, ensure_ascii=False)}'"


def _sample(variable: Variable) -> Any:
    if variable.role == "messages":
        return [{"role": "user", "content": "…"}]
    value = variable.options[0] if variable.options else SAMPLES.get(variable.type.name, "…")
    return [value] if variable.type.is_list or variable.type.name == "list" else value


def _nested(values: Mapping[ValuePath, Any]) -> Any:
    """One object that holds the values at their paths. A path into a list means the whole list."""
    result: dict[str, Any] = {}
    for path, value in values.items():
        if not path:
            return value
        names = [str(step) for step in path if isinstance(step, str)]
        node = result
        for name in names[:-1]:
            node = node.setdefault(name, {})
        node[names[-1]] = value
    return result
