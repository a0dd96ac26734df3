"""Logits of a pass from transformers' own model code: any architecture whose attention goes through AttentionInterface.

The code runs without a cache of its own: it sees all tokens in one line, and its attention calls `Pass.attend`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from model_compose.engines.huggingface.attention import Pass
from model_compose.engines.huggingface.cache import LayerShape
from model_compose.engines.huggingface.rotary import Rotary, longrope_modules, rotate_by_row, switch_length
from model_compose.errors import LoadError
from model_compose.lora.live import Mix

NAME = "model_compose"
"""Of our attention in transformers' registry."""


class Forward(Protocol):
    """A model's code. layers: what each of them keeps in the KV cache. switch: the length beyond which all tokens of a text
    have other keys (rotary.py); None where there is no such length."""

    layers: list[LayerShape]
    switch: int | None

    def __call__(self, step: Pass, mix: Mix | None) -> Tensor:
        """(pieces, vocabulary): the logits behind the last token of each piece, in the order of the pass."""


class Attends(Protocol):
    @property
    def long(self) -> Tensor: ...

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scaling: float | None, window: int | None, cap: float
    ) -> Tensor: ...


_running: ContextVar[Attends] = ContextVar("running")


class TransformersForward:
    """Raises LoadError where the model's attention cannot be taken over."""

    def __init__(self, model: nn.Module, device: torch.device, name: str) -> None:
        self._model, self._device = model, device
        self.switch = switch_length(model, name)
        if self.switch is not None:
            for module in longrope_modules(model):
                module.forward = _rotary_by_row(module.forward, self.switch)
        probe = _Probe()
        try:
            with _attending(probe):
                first = torch.zeros(1, dtype=torch.long, device=device)
                model(input_ids=first[None], position_ids=first[None], use_cache=False, logits_to_keep=first)
        except NotImplementedError as error:
            raise LoadError(f"{name} uses {error}, which the embedded engine cannot serve yet") from error
        except TypeError as error:
            raise LoadError(
                f"{name}: {type(model).__name__} cannot be asked as the embedded engine does: {error}"
            ) from error
        config: Any = model.config
        if sorted(probe.layers) != list(range(config.get_text_config().num_hidden_layers)):
            raise LoadError(own_attention(name, type(model).__name__))
        self.layers = [probe.layers[layer] for layer in sorted(probe.layers)]

    def __call__(self, step: Pass, mix: Mix | None) -> Tensor:
        # The hooks of the LoraModel know the mix.
        with _attending(step):
            logits: Tensor = self._model(
                input_ids=step.tokens[None],
                position_ids=step.positions[None],
                use_cache=False,
                logits_to_keep=step.last,
            ).logits[0]
        return logits


def own_attention(name: str, architecture: str) -> str:
    """What to say of a model that does not go through AttentionInterface."""
    return f"{name} ({architecture}) has attention of its own, which the embedded engine cannot take over; use another base"


class _Probe:
    """Stands where a pass does, for one token, to see what each layer would keep."""

    def __init__(self) -> None:
        self.layers: dict[int, LayerShape] = {}
        self.long = torch.zeros(1, dtype=torch.bool)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        self.layers[layer] = LayerShape(k.shape[1], k.shape[2], v.shape[2], k.dtype, k.device)
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


def _rotary_by_row(rotary: Rotary, switch: int) -> Rotary:
    def forward(x: Tensor, position_ids: Tensor, **options: Any) -> tuple[Tensor, ...]:
        return rotate_by_row(rotary, switch, _running.get().long, x, position_ids, **options)

    return forward


@contextmanager
def _attending(what: Attends) -> Iterator[None]:
    token = _running.set(what)
    try:
        with torch.inference_mode():
            yield
    finally:
        _running.reset(token)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """`attend` in the shapes of AttentionInterface: (1, heads, tokens, dim) -> (1, tokens, heads, dim)."""
    if s_aux is not None:
        raise NotImplementedError("attention sinks")
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    out = _running.get().attend(module.layer_idx, q, k, v, scaling=scaling, window=sliding_window, cap=softcap or 0.0)
    return out[None], None


AttentionInterface.register(NAME, _attention)
