"""Whether the embedded engine may run a model's own code. We test the code with a few tokens when the model loads.

A pass has the tokens of several rows in one line. The result is exact only if the model's code combines tokens in
attention alone, places them by the positions that we give, and asks for an attention that a Pass computes. Any other
model would give wrong answers without an error, so it is refused here with the reason.
"""

import threading
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
"""Keywords that model code passes to attention although attention does not need them."""

TOLERANCE = {torch.float32: 0.005}
"""The largest difference by rounding, relative to the largest number. Quantised Linears of a float32 model round to
bfloat16."""

TOLERANCE_OF_16_BITS = 0.03

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""How transformers describes a mask: (batch, head, query, key) -> whether that query may look at that key."""


_registry = threading.Lock()
"""transformers has one registry of masks for the process, and two models may be loaded at the same time."""


class NotServed(Exception):
    """The model needs something that a Pass does not compute. The message continues a sentence: the model …"""


class Probe:
    """Takes the place of a Pass and records what the model does.

    context: the longest text in tokens; if None, the arguments of attention are not checked.

    seen: q, k and v (tokens, heads, dim) of each layer. unfit: modules that adapters cannot act on, and why.
    """

    def __init__(self, tokens: Tensor, context: int | None = None) -> None:
        self.tokens, self._context = len(tokens), context
        self.long = torch.zeros_like(tokens, dtype=torch.bool)
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.unfit: dict[str, str] = {}

    def check(self, module: Any, mask: Tensor | None, window: int | None, others: Mapping[str, Any]) -> None:
        """Checks the arguments that the code passes to attention. Raises NotServed."""
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
        """Returns each token's own value, as if it attended only to itself."""
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
        """What each layer keeps in the KV cache."""
        return [
            LayerShape(k.shape[1], k.shape[2], v.shape[2], k.dtype, k.device)
            for _, (_, k, v) in sorted(self.seen.items())
        ]


@contextmanager
def watching(model: nn.Module, probe: Probe, kept: int) -> Iterator[None]:
    """Finds modules that adapters cannot act on, while the model runs.

    kept: the count of tokens whose logits it computes.
    """
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
        if path.rpartition(".")[0] in called:  # a vision tower is not called as a whole
            probe.unfit[path] = "the model's code does not call it"


def check_alike(one: Probe, other: Probe, pairs: Mapping[int, int]) -> None:
    """Checks that a token gets the same numbers in both runs: number i of `one` is number pairs[i] of `other`.

    Raises NotServed.
    """
    # Two layers are enough. In later layers, a rounding difference may make a router choose another expert.
    for layer in sorted(one.seen)[:2]:
        for mine, theirs in zip(one.seen[layer], other.seen[layer], strict=True):
            tolerance = TOLERANCE.get(mine.dtype, TOLERANCE_OF_16_BITS)
            mine, theirs = mine[list(pairs)].float(), theirs[list(pairs.values())].float()
            if (mine - theirs).abs().max() > tolerance * mine.abs().max():
                raise NotServed(
                    "computes a token from more than its own position and attention: from the order of tokens, or from its "
                    "neighbours"
                )


@contextmanager
def mask_rules(attention: str) -> Iterator[None]:
    """Within the block, transformers gives models with this attention masks that carry their rule; otherwise it makes
    none.
    """
    with _registry:
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
        except IndexError:  # the rule looks up something that belongs to each token
            raise NotServed(f"masks attention {layer} by what tokens are, not by their positions alone") from None

    if looks(0, 1):
        raise NotServed(f"lets tokens attend to later ones {layer}, as no causal language model does")
    # We ask at the end of the longest text, where a window has an effect, and for two neighbours, since chunked
    # attention may start a chunk at one of them.
    for query in (context - 2, context - 1):
        first = 0 if window is None else max(0, query - window + 1)
        if not looks(query, first) or (first and looks(query, first - 1)):
            raise NotServed(f"masks attention {layer} in another way than causally within the window that it names")
