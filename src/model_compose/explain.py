"""pydantic's errors in the words of somebody who writes YAML: file:line, the path as they wrote it, what is wrong.

A value is repeated in a message only where it cannot be a secret.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from yaml.nodes import Node, ScalarNode

from model_compose.nodes import at, below, child, keys
from model_compose.schema import decimal_advice, nearest, shown

SECRETS = frozenset(("token", "api_keys", "callback_secret"))
"""Keys whose values never appear in a message."""

# What was expected, by the type of pydantic's error.
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
    """One line a problem, in the order in which pydantic found them."""
    found: dict[tuple[str, str], list[Any]] = {}
    for item in error.errors(include_url=False):
        node, path = _locate(root, item)
        # The members of a union fail one by one at the same place: they are one problem.
        found.setdefault((at(node), ".".join(path)), []).append(item)
    lines = []
    for (place, keys_to_it), items in found.items():
        where = f"{place}: {keys_to_it}: " if keys_to_it else f"{place}: "
        secret = bool(SECRETS & set(keys_to_it.split(".")))
        lines += [where + message for message in dict.fromkeys(_messages(items, secret))]
    return lines


def _messages(items: Sequence[Any], secret: bool) -> list[str]:
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
        return f"holds at most {context['max_length']}, not {context['actual_length']}"
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
    """What stood there instead. Numbers where text is wanted are the commonest slip, and quotes its remedy."""
    if secret:
        return ""
    value = item["input"]
    quotes = "; put it in quotes" if item["type"] == "string_type" and isinstance(value, int | float) else ""
    advice = decimal_advice(value) if item["type"] in ("int_parsing", "float_parsing") else ""
    return f", not {shown(value)}{quotes}{advice}"


def _near(value: Any, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(value), allowed, n=1) if len(allowed) > 1 else []
    return f"; did you mean '{near[0]}'?" if near else ""


def _tag(kind: str, context: Mapping[str, Any]) -> str:
    key = str(context.get("discriminator", "")).strip("'")
    if kind == "union_tag_not_found":
        return f"the key '{key}' is missing"
    names = [name.strip("' ") for name in str(context.get("expected_tags")).split(",")]
    tag = str(context.get("tag"))
    return f"unknown {key} '{tag}'; {nearest(tag, names)}"


def _locate(root: Node, item: Any) -> tuple[Node, list[str]]:
    """The node that an error speaks of, and its path as the user wrote it.

    Parts of pydantic's location that are no keys of the file (a union's tags, a missing key) are skipped.
    """
    node, path = _walk(root, item["loc"])
    return _culprit(node, item) or node, path


def place(root: Node, path: Iterable[Any]) -> str:
    """ "file:line: keys" of what stands at a path of keys."""
    node, keys_to_it = _walk(root, path)
    return f"{at(node)}: {'.'.join(keys_to_it)}"


def _walk(root: Node, path: Iterable[Any]) -> tuple[Node, list[str]]:
    node, keys_to_it = root, []
    for part in path:
        found = child(node, part)
        if found is not None:
            node = found
            keys_to_it.append(str(part))
    return node, keys_to_it


def _culprit(node: Node, item: Any) -> Node | None:
    """The key or scalar under `node` that the error is about, where its own location stops at `node`."""
    kind, context = item["type"], item.get("ctx", {})
    if kind in ("unknown_key", "unsupported_key"):
        return _last(keys(node), context["key"])
    if kind == "unknown_adapter":
        blend = child(child(node, "blends"), context["blend"])
        return _last([*keys(blend), *keys(child(blend, "weights"))], context["key"])
    if kind in ("duplicate_name", "name"):  # the second of the two
        adapters = child(node, "peft_adapters")
        names = [child(adapter, "name") for adapter in (adapters.value if adapters is not None else ())]
        return _last([*filter(None, names), *keys(child(node, "blends"))], context["key"])
    if kind == "value_error":
        # Our own messages quote what they complain of before the semicolon, the culprit last.
        for name in reversed(re.findall(r"'([^']+)'", item["msg"].split(";")[0])):
            scalars = [part for part in below(node) if isinstance(part, ScalarNode)]
            if found := _last(keys(node), name) or _last(scalars, name):
                return found
    return None


def _last(nodes: Sequence[Node], value: Any) -> Node | None:
    return next((node for node in reversed(nodes) if node.value == value), None)
