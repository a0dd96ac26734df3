"""Runs as the page shows them: what was asked, under which blend, what came out. Pure text to HTML; knows no gradio."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

from model_compose.components import Answer

Status = Literal["running", "done", "stopped", "failed"]


@dataclass(frozen=True)
class Run:
    """One press of "Run Workflow". texts: label -> text, one for each place of the workflow's output.

    mixed: the weights that were asked for, where no answer tells them.
    """

    asked: str
    texts: Mapping[str, str] = field(default_factory=dict)
    status: Status = "running"
    seconds: float = 0.0
    answers: tuple[Answer, ...] = ()
    notes: Sequence[str] = ()
    error: str | None = None
    mixed: str = ""


def asked(value: Any) -> str:
    """The input in a few words: the text itself where there is just one, else a line for each field."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and "content" in value[0]:
        return asked(value[0]["content"])  # one message of a conversation
    if not isinstance(value, dict):
        return "" if value is None else _shown(value)
    if len(value) == 1:
        return asked(next(iter(value.values())))
    return "\n".join(f"{name}: {_shown(item)}" for name, item in value.items())


def texts(output: Any) -> dict[str, str]:
    """A workflow's output as texts, each under its dotted path; "" is the path of a bare value."""
    return {label(path): _shown(value) for path, value in _leaves(output, ())}


def label(path: Iterable[Any]) -> str:
    """A path of the output, dotted."""
    return ".".join(map(str, path))


def current(run: Run) -> str:
    """The newest run, large."""
    several = len(run.texts) > 1
    told = bool(run.notes) and not several  # a note says already that the text is empty
    boxes = "".join(_box(label if several else "", text, run.status, told) for label, text in run.texts.items())
    if not run.texts and run.status == "running":
        boxes = _box("", "", run.status, told)
    error = f'<p class="mc-error" role="alert">{escape(run.error)}</p>' if run.error else ""
    busy = "true" if run.status == "running" else "false"
    shown = f"{boxes}{error}{_notes(run)}{_facts(run)}"
    return f'<article class="mc-run mc-{run.status}" aria-busy="{busy}">{shown}</article>'


def earlier(runs: Iterable[Run]) -> str:
    """Runs before the newest, newest first, close enough together to compare."""
    cards = "".join(_card(run) for run in runs)
    return f'<section class="mc-earlier"><h3>Earlier runs</h3>{cards}</section>' if cards else ""


def snippet(title: str, code: str) -> str:
    """A block of code to copy."""
    return (
        f'<section class="mc-copyable mc-snippet"><h4>{escape(title)}</h4>{_COPY}'
        f'<pre tabindex="0"><code data-text>{escape(code)}</code></pre></section>'
    )


NOTHING = '<article class="mc-run mc-idle"><p class="mc-none">The text appears here.</p></article>'
_COPY = '<button type="button" class="mc-copy" data-copy>Copy</button>'


def _box(label: str, text: str, status: Status, told: bool) -> str:
    heading = f"<h4>{escape(label)}</h4>" if label else ""
    empty = '<span class="mc-none">empty text</span>' if not (text or told) and status == "done" else ""
    copy = _COPY if text and status != "running" else ""
    shown = f'<div class="mc-text" data-text>{escape(text)}</div>'
    return f'<div class="mc-copyable mc-box">{heading}{copy}{shown}{empty}</div>'


def _card(run: Run) -> str:
    several = len(run.texts) > 1
    boxes = "".join(
        (f"<h4>{escape(label)}</h4>" if several else "") + f'<div class="mc-text">{escape(text)}</div>'
        for label, text in run.texts.items()
    )
    error = f'<p class="mc-error">{escape(run.error)}</p>' if run.error else ""
    shown = f"{boxes}{error}{_notes(run)}{_facts(run)}"
    return f'<article class="mc-card"><p class="mc-asked">{escape(run.asked)}</p>{shown}</article>'


def _notes(run: Run) -> str:
    """What a person should know about the texts, such as that one was cut."""
    return "".join(f'<div class="mc-notice">{escape(note[:1].upper() + note[1:])}.</div>' for note in run.notes)


def _facts(run: Run) -> str:
    """The line under a text: blend, tokens, speed, time, identity."""
    lines = [_facts_of(run, answer, named=len(run.answers) > 1) for answer in run.answers]
    if run.status == "running":
        lines = [f"running — {run.seconds:.1f} s"]
    elif run.status == "stopped":
        blend = f" — blend: <b>{escape(run.mixed)}</b>" if run.mixed else ""
        lines = [f"stopped after {run.seconds:.1f} s{blend}"]
    return "".join(f'<p class="mc-facts">{line}</p>' for line in lines)


def _facts_of(run: Run, answer: Answer, *, named: bool) -> str:
    usage = answer.usage
    parts = [
        # a model without adapters has nothing to say here
        *(
            [f"blend: <b>{escape(blend_shown(answer))}</b>"]
            if answer.blend.weights or answer.blend.name != "default"
            else []
        ),
        f"{usage.completion_tokens} token{'s' * (usage.completion_tokens != 1)}, {usage.tokens_per_second:.1f} tok/s",
        f"{usage.seconds if named else run.seconds:.1f} s",
        f'<span title="{escape(answer.identity)}">identity <code>{escape(answer.identity[:8])}</code></span>',
    ]
    return " — ".join([escape(answer.component), *parts] if named else parts)


def blend_shown(answer: Answer) -> str:
    """Such as "alpaca 0.7 · assistant 0.8 (default)", or "alpaca 1 · pirate 0.5 (merged, ties)"."""
    blend = answer.blend
    if not blend.active:
        return mixed({}) if blend.name in (None, "default") else f"{mixed({})} ({blend.name})"
    method = f", {blend.method.method}" if blend.method else ""
    return f"{mixed(blend.weights)} ({blend.name or 'custom'}{method})"


def mixed(weights: Mapping[str, float]) -> str:
    """The adapters that have weight, in the order given."""
    return " · ".join(f"{name} {weight:g}" for name, weight in weights.items() if weight) or "bare base"


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, str(index)))
    else:
        yield path, value


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
