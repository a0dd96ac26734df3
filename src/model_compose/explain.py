"""Turns pydantic's errors into messages for somebody who writes YAML: file:line, the keys, and what is wrong there.

A message shows the wrong value, unless the value may be a secret.
"""

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError
from yaml.nodes import Node

from model_compose.config import Config
from model_compose.declared import declarations, keys_in
from model_compose.errors import Keys
from model_compose.nodes import at, culprit, follow
from model_compose.schema import Secret, decimal_advice, nearest, shown

# For each type of pydantic's errors, what was expected.
_EXPECTED = {
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
}


def explain(error: ValidationError, root: Node) -> list[str]:
    """One line for each problem, in the order in which pydantic found them. root: the file's nodes."""
    found: dict[tuple[str, Keys], list[Any]] = {}
    for item in error.errors(include_url=False):
        node, keys = follow(root, keys_in(Config, item["loc"]))
        line = at(culprit(node, item.get("ctx", {}).get("at", ())))
        # pydantic reports an error for each member of a union. They have the same place and are one problem.
        found.setdefault((line, keys), []).append(item)
    lines = []
    for (line, keys), items in found.items():
        where = ": ".join(filter(None, (line, ".".join(map(str, keys)))))
        secret = any(declarations(Config, keys, Secret))
        lines += [f"{where}: {message}" for message in dict.fromkeys(_messages(items, secret))]
    return lines


def _messages(items: list[Any], secret: bool) -> list[str]:
    if len(items) > 1 and all(item["type"] in _EXPECTED for item in items):
        expected = " or ".join(dict.fromkeys(_EXPECTED[item["type"]] for item in items))
        return [f"expected {expected}{_got(items[0], secret)}"]
    return [_message(item, secret) for item in items]


def _message(item: Any, secret: bool) -> str:
    kind, context = item["type"], item.get("ctx", {})
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}{_got(item, secret)}"
    if kind == "missing":
        return f"the key '{item['loc'][-1]}' is missing"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        return f"expected {context['expected']}{_got(item, secret)}{_near(item['input'], allowed)}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return _tag(kind, context)
    if kind == "too_long":
        return f"a list of at most {context['max_length']}, not of {context['actual_length']}"
    if kind == "weight" and isinstance(item["input"], str) and "${" in item["input"]:
        return (
            f"a weight in the file is a number or ${{env.NAME}}, not {shown(item['input'])}; for weights that come with "
            "a request, set the action's `blend`"
        )
    message = str(item["msg"]).removeprefix("Value error, ")
    if message.startswith(("Input should be ", "String should ")):  # bounds
        message = re.sub(r"^(Input|String) should ", "must ", message)
        return message + _got(item, secret)
    return message


def _got(item: Any, secret: bool) -> str:
    """The end of a message that says what the file has instead. A number in place of text is told to need quotes."""
    if secret:
        return ""
    value = item["input"]
    quotes = "; put it in quotes" if item["type"] == "string_type" and isinstance(value, int | float) else ""
    advice = decimal_advice(value) if item["type"] in ("int_parsing", "float_parsing") else ""
    return f", not {shown(value)}{quotes}{advice}"


def _near(value: Any, allowed: Collection[str]) -> str:
    near = difflib.get_close_matches(str(value), allowed, n=1) if len(allowed) > 1 else []
    return f"; did you mean '{near[0]}'?" if near else ""


def _tag(kind: str, context: Mapping[str, Any]) -> str:
    key = str(context.get("discriminator", "")).strip("'")
    if kind == "union_tag_not_found":
        return f"the key '{key}' is missing"
    names = [name.strip("' ") for name in str(context.get("expected_tags")).split(",")]
    tag = str(context.get("tag"))
    return f"unknown {key} '{tag}'; {nearest(tag, names)}"


def place(root: Node, keys: Keys) -> str:
    """ "file:line: keys" of the value at `keys`. Keys that the file does not have are left out."""
    node, found = follow(root, keys)
    return f"{at(node)}: {'.'.join(map(str, found))}"
