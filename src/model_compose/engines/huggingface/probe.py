"""Whether the embedded engine may run a model's own code: what that code does with a few tokens, before it is trusted.

A pass puts tokens of several rows in one line. That is exact only if the model's code brings tokens together nowhere but in
attention, places them by the positions that we give, and wants the attention that a Pass computes. A model for which this
does not hold would answer, and the answers would be wrong. So its code is asked here, and refused with the reason.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface

from model_compose.engines.huggingface.attention import Scoring
from model_compose.engines.huggingface.cache import LayerShape
from model_compose.lora.layers import module_shapes

HARMLESS = ("position_ids", "logits_to_keep")
"""Keywords that model code passes on to attention, which has no use for them."""

TOLERANCE = 0.03
"""Relative; what rounding in 16 bits may change."""

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query, key) -> whether that query may look at that key: how transformers describes a mask."""


class NotServed(Exception):
    """The model wants something that a Pass does not compute. The message goes on after "the model"."""


class Probe:
    """Stands where a Pass does. context: the longest text, in tokens; None to trust what is asked of attention.

    seen: the q, k and v (tokens, heads, dim) of each layer. unfit: modules that adapters cannot act on, with the reason.
    """

    def __init__(self, tokens: int, context: int | None = None) -> None:
        self.tokens, self._context = tokens, context
        self.long = torch.zeros(tokens, dtype=torch.bool)
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.unfit: dict[str, str] = {}

    def check(self, module: Any, mask: Tensor | None, window: int | None, others: Mapping[str, Any]) -> None:
        """What the code asks of attention. Raises NotServed."""
        if not isinstance(getattr(module, "layer_idx", None), int):
            raise NotServed("has attention outside its numbered layers")
        if self._context is None:
            return
        layer = f"in layer {module.layer_idx}"
        unknown = [
            key
            for key, value in others.items()
            if key not in (*HARMLESS, "is_causal") and (isinstance(value, Tensor) or value)
        ]
        if unknown:
            raise NotServed(f"gives attention {' and '.join(map(repr, unknown))} {layer}")
        causal = others.get("is_causal")
        if mask is None and not (getattr(module, "is_causal", True) if causal is None else causal):
            raise NotServed(f"lets tokens attend to later ones {layer}, as no causal language model does")
        if mask is not None:
            _check_mask(mask, window, self._context, layer)
        elif window is not None and window < self._context:
            raise NotServed(f"names a window of {window} tokens {layer}, and masks nothing")

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, how: Scoring) -> Tensor:
        """The tokens' own values, as if each attended to itself alone."""
        if layer in self.seen:
            raise NotServed(f"calls attention more than once in layer {layer}")
        heads, keys = q.shape[1], k.shape[1]
        fits = len(q) == len(k) == len(v) == self.tokens and q.shape[2] == k.shape[2]
        if not fits or keys != v.shape[1] or heads % keys or (how.sinks is not None and how.sinks.shape != (heads,)):
            shapes = ", ".join(str(tuple(states.shape)) for states in (q, k, v))
            raise NotServed(f"gives attention queries, keys and values of shapes {shapes} in layer {layer}")
        self.seen[layer] = (q, k, v)
        return v.repeat_interleave(heads // keys, dim=1)

    @property
    def layers(self) -> list[LayerShape]:
        """What each layer keeps."""
        return [
            LayerShape(k.shape[1], k.shape[2], v.shape[2], k.dtype, k.device)
            for _, (_, k, v) in sorted(self.seen.items())
        ]


@contextmanager
def watching(model: nn.Module, probe: Probe, kept: int) -> Iterator[None]:
    """Finds the modules that are unfit for adapters while the model runs. kept: tokens of which it computes logits."""
    shapes, called = module_shapes(model), set[str]()

    def note(path: str, inputs: tuple[Any, ...], output: Any) -> None:
        called.add(path)
        if (shape := shapes.get(path)) is None:
            return
        x = inputs[0] if inputs else None
        count = x.numel() // (1 if shape.kind == "embedding" else shape.inputs) if isinstance(x, Tensor) else kept
        if not isinstance(output, Tensor):
            probe.unfit[path] = "it returns more than one tensor"
        elif count not in (probe.tokens, kept):
            probe.unfit[path] = f"it was given {count} tokens of {probe.tokens}"

    handles = [
        module.register_forward_hook(lambda _, inputs, output, path=path: note(path, inputs, output))
        for path, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for path in shapes.keys() - called:
        if path.rpartition(".")[0] in called:  # unlike the parts of a vision tower, which rest as a whole
            probe.unfit[path] = "the model's code does not call it"


def check_alike(one: Probe, other: Probe, pairs: Mapping[int, int]) -> None:
    """That a token is the same in both runs, whatever stands around it: there number i, here number pairs[i]. Raises
    NotServed."""
    # Two layers tell enough. Further down, a router may send a rounding difference to another expert.
    for layer in sorted(one.seen)[:2]:
        for mine, theirs in zip(one.seen[layer], other.seen[layer], strict=True):
            mine, theirs = mine[list(pairs)].float(), theirs[list(pairs.values())].float()
            if (mine - theirs).abs().max() > TOLERANCE * mine.abs().max():
                raise NotServed(
                    "computes a token from more than its own position and attention: from the order of tokens, or from its "
                    "neighbours"
                )


@contextmanager
def mask_rules(attention: str) -> Iterator[None]:
    """Models that have this attention get masks that know their rule. Without it transformers makes them none."""
    AttentionMaskInterface.register(attention, _with_rule)
    try:
        yield
    finally:
        del AttentionMaskInterface._global_mapping[attention]


def _with_rule(*, q_length: int, kv_length: int, mask_function: Rule, device: Any = None, **_: Any) -> Tensor:
    mask: Any = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool, device=device)
    mask.rule = mask_function
    return mask  # type: ignore[no-any-return]


def _check_mask(mask: Tensor, window: int | None, context: int, layer: str) -> None:
    rule: Rule | None = getattr(mask, "rule", None)
    if rule is None:
        raise NotServed(f"gives attention a mask of its own {layer}")

    def looks(query: int, key: int) -> bool:
        try:
            return bool(rule(*(torch.tensor(number) for number in (0, 0, query, key))))
        except IndexError:  # it looks up something of each token
            raise NotServed(f"masks attention {layer} by what tokens are, not by their positions alone") from None

    if looks(0, 1):
        raise NotServed(f"lets tokens attend to later ones {layer}, as no causal language model does")
    # At the end of the longest text, where a window shows; two neighbours, since a chunk may begin at one of them.
    for query in (context - 2, context - 1):
        first = 0 if window is None else max(0, query - window + 1)
        if not looks(query, first) or (first and looks(query, first - 1)):
            raise NotServed(f"masks attention {layer} in another way than causally within the window that it names")
