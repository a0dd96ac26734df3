"""Logits of a pass by transformers' own model code, for any architecture whose attention uses AttentionInterface.

The model's code gets all tokens in one line and keeps no cache of its own: its attention calls `Pass.attend`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from model_compose.engines.huggingface.attention import Pass, Scoring
from model_compose.engines.huggingface.cache import LayerShape
from model_compose.engines.huggingface.probe import NotServed, Probe, check_alike, mask_rules, watching
from model_compose.engines.huggingface.rotary import Rotary, longrope_modules, rotate_by_row, switch_length
from model_compose.engines.sizes import context_length
from model_compose.errors import LoadError
from model_compose.lora.live import Mix

NAME = "model_compose"
"""The name of our attention in transformers' registry."""


class Forward(Protocol):
    """Computes a pass with a model.

    layers: what each layer keeps in the KV cache. switch: if a text becomes longer than this, all of its keys change
    (rotary.py); None for most models.
    """

    layers: list[LayerShape]
    switch: int | None

    def __call__(self, step: Pass, mix: Mix | None) -> Tensor:
        """(pieces, vocabulary): the logits after the last token of each piece, in the order of the pass."""


_running: ContextVar[Pass | Probe] = ContextVar("running")


class TransformersForward:
    """Raises LoadError if the embedded engine cannot run the model's code.

    unfit: modules that take no adapter, and why.
    """

    def __init__(self, model: nn.Module, device: torch.device, name: str) -> None:
        self._model, self._device, self._context = model, device, context_length(model.config)
        self.switch = switch_length(model, name)
        if self.switch is not None:
            for module in longrope_modules(model):
                module.forward = _rotary_by_row(module, self.switch)
        title = f"{name} ({type(model).__name__})"
        try:
            probe = self._probe()
        except NotServed as error:
            raise LoadError(f"{title} {error}, which the embedded engine does not compute; use another base") from error
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # the model's own code may raise anything
            raise LoadError(
                f"{title} cannot be run as the embedded engine does, by token, position and attention "
                f"({type(error).__name__}: {error}); use another base"
            ) from error
        config: Any = model.config
        if sorted(probe.seen) != list(range(config.get_text_config().num_hidden_layers)):
            raise LoadError(own_attention(name, type(model).__name__))
        self.layers, self.unfit = probe.layers, probe.unfit

    def __call__(self, step: Pass, mix: Mix | None) -> Tensor:
        # The hooks of the LoraModel have the mix already.
        logits = self._ask(step, step.tokens, step.positions, step.last)
        return (
            logits if len(logits) == len(step.last) else logits[step.last]
        )  # some models compute the logits of all tokens

    def _ask(self, running: Pass | Probe, tokens: Tensor, positions: Tensor | None, last: Tensor) -> Tensor:
        given = {} if positions is None else {"position_ids": positions[None]}
        with _attending(running):
            logits: Tensor = self._model(input_ids=tokens[None], use_cache=False, logits_to_keep=last, **given).logits[
                0
            ]
        return logits

    def _probe(self) -> Probe:
        """Raises NotServed, and whatever the model's code raises."""
        config: Any = self._model.config
        middle = config.get_text_config().vocab_size // 2  # special tokens are at the ends
        tokens = torch.arange(middle, middle + 5, device=self._device)
        kept = torch.tensor([0, 4], device=self._device)
        first = Probe(tokens, self._context)
        with mask_rules(NAME), watching(self._model, first, len(kept)):
            logits = self._ask(first, tokens, None, kept)
        if len(logits) not in (len(kept), len(tokens)):
            raise NotServed(f"gives logits for {len(logits)} of {len(tokens)} tokens")
        # Tokens 4, 2 and 0 again at the same positions, but in another order and next to other tokens.
        again = Probe(tokens)
        others = tokens[[4, 3, 2, 1, 0]] + torch.tensor([0, 5, 0, 5, 0], device=self._device)
        self._ask(again, others, torch.tensor([4, 9, 2, 7, 0], device=self._device), kept)
        check_alike(first, again, {0: 4, 2: 2, 4: 0})
        return first


def own_attention(name: str, architecture: str) -> str:
    """The error for a model that does not use AttentionInterface."""
    return f"{name} ({architecture}) has attention of its own, which the embedded engine cannot take over; use another base"


def _rotary_by_row(module: nn.Module, switch: int) -> Rotary:
    """The module's forward, with each row's own set of factors. Some of a module's layer types may not use longrope."""
    rotary: Rotary = module.forward
    kinds: Any = module.rope_type

    def forward(x: Tensor, position_ids: Tensor, layer_type: str | None = None, **options: Any) -> tuple[Tensor, ...]:
        if layer_type is not None:
            options["layer_type"] = layer_type
            if kinds[layer_type] != "longrope":
                return rotary(x, position_ids, **options)
        return rotate_by_row(rotary, switch, _running.get().long, x, position_ids, **options)

    return forward


@contextmanager
def _attending(what: Pass | Probe) -> Iterator[None]:
    token = _running.set(what)
    try:
        with torch.inference_mode():
            yield
    finally:
        _running.reset(token)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """`Pass.attend` in the shapes of AttentionInterface: (1, heads, tokens, dim) -> (1, tokens, heads, dim)."""
    running = _running.get()
    if isinstance(running, Probe):
        running.check(module, attention_mask, sliding_window, others)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    out = running.attend(module.layer_idx, q, k, v, Scoring(scaling, sliding_window, softcap or 0.0, s_aux))
    return out[None], None


AttentionInterface.register(NAME, _attention)
