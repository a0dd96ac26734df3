"""The live and the folded way of running a blend on a torch model.

Live: each adapted module adds what its branch computes (live.py), by a hook or, where modules are fused, in a Projection.

Folded: W + Σ w s B A (or what another method makes of the s B A), summed in float32 and rounded once to W's dtype. The
originals stay referenced (mapped, where the checkpoint is mapped) and are put back on unfold; nothing is ever subtracted.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from model_compose.errors import AdapterError
from model_compose.lora.adapter import LoraAdapter, ModuleShape, check, check_copies, is_copy
from model_compose.lora.blend import Blend, delta
from model_compose.lora.folding import add_in_blocks, page_out, swap, untie
from model_compose.lora.live import Branch, Layout, Mix, Placed
from model_compose.lora.methods import Method

IDLE_USES = 64
"""An adapter leaves the stack after so many passes without a request for it: the next one often comes soon."""


@dataclass(frozen=True)
class Placement:
    """Where and in which dtype one adapter computes; None is the base module's own."""

    device: torch.device | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Site:
    """A weight that adapters act on. members: the paths whose modules it serves, each with its rows of the weight."""

    module: nn.Module
    members: Mapping[str, slice]
    branch: Branch
    handle: RemovableHandle | None = None


@dataclass(frozen=True)
class Projection:
    """A Linear, or several that read the same input fused into one product, with what the adapters add to it."""

    module: nn.Module
    branch: Branch
    dtype: torch.dtype | None = None

    def __call__(self, x: Tensor, mix: Mix | None) -> Tensor:
        """x: (tokens, in) -> (tokens, out) in dtype, or the module's own; the fused modules' outputs stand side by side."""
        y: Tensor = self.module(x)
        y = y if self.dtype is None else y.to(self.dtype)
        return y if mix is None else self.branch.add(x, y, mix)


class LoraModel:
    """A base model with its adapters attached: live by default, or with one blend folded into the weights.

    The base's module tree, names and parameters stay as they were; only forward hooks are added, and `fuse` takes some of
    them away again. One thread at a time. Raises AdapterError where an adapter does not fit.

    max_on_device: how many adapters' factors stay on their device, if those in use are not more; None keeps all. dtype: of
    the activations, where that is not the weights'. holds: whether a tensor is the base's parameter of that name; by
    default the model tells, whose weights must not be packed then.
    """

    def __init__(
        self, model: nn.Module, adapters: Iterable[LoraAdapter] = (), placements: Mapping[str, Placement] | None = None,
        *, max_on_device: int | None = None, dtype: torch.dtype | None = None,
        holds: Callable[[str, Tensor], bool | None] | None = None,
    ) -> None:  # fmt: skip
        self.model = model
        self._holds = holds
        self.folded: Blend | None = None
        self.mix: Mix | None = None
        """The weights of the pass that is running; None where no adapter is in use, or a blend is folded in."""
        self.swaps = 0
        """How often weights were exchanged: what was read of them before may be gone."""
        self._placed: dict[str, Placed] = {}
        self._layouts: dict[Layout, Layout] = {}
        self._max_on_device = max_on_device
        self._on_device: dict[str, None] = {}
        self._stack: frozenset[str] = frozenset()
        self._idle_uses = 0
        self._unfit: Mapping[str, str] = {}
        self._sites: dict[str, Site] = {}
        self._originals: dict[str, Tensor] = {}
        self._rested: dict[Method | None, tuple[Blend, dict[str, Tensor]]] = {}
        """Folded weights that are kept for later, with their blend: one for each method, the sum (None) among them."""
        self._shapes = module_shapes(model)
        self._dtype = dtype or _compute_dtype(model)
        for adapter in adapters:
            self.load(adapter, (placements or {}).get(adapter.name, Placement()))

    @property
    def adapters(self) -> Mapping[str, LoraAdapter]:
        # A copy is one step: other threads ask, too.
        return {name: placed.adapter for name, placed in self._placed.copy().items()}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._placed)

    def load(self, adapter: LoraAdapter, placement: Placement = Placement(), *, key: str | None = None) -> None:
        """Attaches one more adapter, live, under `key` or its name. Raises AdapterError where it does not fit; nothing has
        changed then."""
        adapter = check(adapter, self._shapes)
        _check_fit(adapter, self._unfit)
        check_copies(adapter, self._holds or self._has)
        device = self.model.get_submodule(next(iter(adapter.modules))).weight.device if adapter.modules else None
        assert device is None or isinstance(device, torch.device)
        place = (placement.device or device or torch.device("cpu"), placement.dtype or self._dtype)
        self._placed[key or adapter.name] = Placed(adapter, place)
        for path in adapter.modules:
            if path not in self._sites:
                self._attach(path)

    def refuse(self, unfit: Mapping[str, str]) -> None:
        """From now on takes no adapter for these modules. Values: why. Raises AdapterError where one acts on them."""
        self._unfit = unfit
        for adapter in self.adapters.values():
            _check_fit(adapter, unfit)

    def _has(self, name: str, copy: Tensor) -> bool:
        return is_copy(copy, dict(self.model.named_parameters(remove_duplicate=False)).get(name))

    def unload(self, name: str) -> None:
        """Takes an adapter away. No request may use it any more."""
        del self._placed[name]
        self._on_device.pop(name, None)
        self._stack -= {name}
        for site in self._sites.values():
            site.branch.drop(name)
        if self.folded is not None and name in self.folded.active:
            self.unfold()
        self._rested = {method: kept for method, kept in self._rested.items() if name not in kept[0].active}

    @contextmanager
    def use(self, rows: Sequence[Blend], counts: Sequence[int] | None = None) -> Iterator[Mix | None]:
        """Within the block, row i of every forward pass gets rows[i]: live, or by the weights if that blend is folded.

        counts: where all tokens stand in one line, how many belong to each row.
        """
        if self.folded is None:
            assert all(row.method is None for row in rows), "only sums run live"
            mix = Mix(rows, counts)
            self._choose_stack(mix)
            self.mix = mix if mix.active else None
        else:
            assert all(row.equals(self.folded) for row in rows), "another blend is folded in"
        try:
            yield self.mix
        finally:
            self.mix = None

    def fuse(self, paths: Sequence[str], make: Callable[[nn.Linear], nn.Module] = lambda linear: linear) -> Projection:
        """Linears that read the same input, as one product; its adapters act in the projection from now on, no longer in
        the modules. The modules' weights become views of the fused one.

        make: what becomes of the fused Linear (a quantised one, say).
        """
        modules = [module for path in paths if isinstance(module := self.model.get_submodule(path), nn.Linear)]
        assert len(modules) == len(paths)
        rows = _slices(module.out_features for module in modules)
        members = dict(zip(paths, rows, strict=True))
        branch = Branch(members, rows[-1].stop, self._placed, layouts=self._layouts)
        linear = modules[0] if len(modules) == 1 else _fused(modules)
        site = Site(make(linear), members, branch)
        if site.module.weight is not linear.weight:  # nothing else may hold on to the plain ones; a tied embedding may
            for module in modules:
                module.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        for path in paths:
            before = self._sites.get(path)
            if before is not None and before.handle is not None:
                before.handle.remove()
            self._sites[path] = site
        return Projection(site.module, branch)

    def embedding(self, path: str) -> Projection:
        """An embedding, its adapters acting in what is returned, no longer in the module. In the activations' dtype."""
        if path not in self._sites:
            self._attach(path)
        site = self._sites[path]
        if site.handle is not None:
            site.handle.remove()
        return Projection(site.module, site.branch, self._dtype)

    def fold(self, blend: Blend) -> None:
        """Adds the blend into the weights; the live way then rests until `unfold`. A swap where it `keeps` the blend."""
        if self.folded is not None and self.folded.equals(blend):
            return
        self.unfold(keep=True)
        self.swaps += 1
        rested = self._rested.pop(blend.method, None)
        if rested is not None and rested[0].equals(blend):
            self._originals = {path: swap(self._sites[path].module, new) for path, new in rested[1].items()}
            self.folded = blend
            return
        del rested  # its memory is needed now
        try:
            self._fold(blend)
        except Exception:  # no memory for a copy: some weights folded and some not would be another function
            self.unfold()
            raise
        self.folded = blend

    def _fold(self, blend: Blend) -> None:
        for path in sorted({path for name in blend.active for path in self._placed[name].adapter.modules}):
            site = self._sites[path]
            first = next(iter(site.members))
            if first in self._originals:  # a fused weight is folded once for all its members
                continue
            untie(self.model, site.module)
            weight = site.module.weight
            assert isinstance(weight, nn.Parameter)
            self._originals[first] = swap(site.module, self._folded(weight.data, site, blend))
            page_out(self._originals[first])

    def can_fold(self, blend: Blend) -> bool:
        """Whether the weights that the blend touches are plain numbers; packed ones (bitsandbytes) are not."""
        sites = [self._sites[path] for name in blend.active for path in self._placed[name].adapter.modules]
        weights = [site.module.weight for site in sites]
        return all(isinstance(weight, Tensor) and weight.is_floating_point() and weight.numel() for weight in weights)

    def fold_bytes(self, blend: Blend) -> int:
        """Of the weights that folding this blend would write anew."""
        paths = {path for name in blend.active for path in self._placed[name].adapter.modules}
        modules = {id(self._sites[path].module): self._sites[path].module for path in paths}
        return sum(module.weight.nbytes for module in modules.values() if isinstance(module.weight, Tensor))

    def keeps(self, blend: Blend) -> bool:
        """Whether folding this blend is but a swap."""
        rested = self._rested.get(blend.method)
        return rested is not None and rested[0].equals(blend)

    def unfold(self, *, keep: bool = False) -> None:
        """Puts the original weights back.

        keep: hold on to the folded ones, so that folding the same blend again is but a swap, until another blend by the
        same method is folded.
        """
        self.swaps += 1
        swapped = {path: swap(self._sites[path].module, original) for path, original in self._originals.items()}
        if self.folded is not None and keep:
            self._rested[self.folded.method] = (self.folded, swapped)
        self._originals = {}
        self.folded = None

    def _folded(self, weight: Tensor, site: Site, blend: Blend) -> Tensor:
        """A new tensor W + Σ w s B A (its transpose for Conv1D and embeddings, whose weights are (in, out))."""
        result = torch.empty_like(weight)
        if blend.method is not None:
            for path, rows in site.members.items():
                whole = delta(blend, self.adapters, path, weight.device)
                if whole is not None and self._shapes[path].kind != "linear":
                    whole = whole.T
                result[rows] = weight[rows] if whole is None else whole.add_(weight[rows])
            return result
        for path, rows in site.members.items():
            parts = [
                (self._placed[name].adapter.modules[path], w)
                for name, w in blend.active.items()
                if path in self._placed[name].adapter.modules
            ]
            if not parts:
                result[rows] = weight[rows]
                continue
            a = torch.cat([factors.a.to(weight.device, torch.float32) for factors, _ in parts])
            b = torch.cat(
                [factors.b.to(weight.device, torch.float32) * (w * factors.scaling) for factors, w in parts], dim=1
            )
            left, right = (a.T, b.T) if self._shapes[path].kind != "linear" else (b, a)
            add_in_blocks(weight[rows], left, right, result[rows])
        return result

    def _choose_stack(self, mix: Mix) -> None:
        """Keeps the last stack while it serves: stacking costs more than some idle columns for a while."""
        self._idle_uses = self._idle_uses + 1 if mix.active < self._stack else 0
        if not mix.active <= self._stack:
            wanted = self._stack | mix.active
            within = self._max_on_device is None or len(wanted) <= self._max_on_device
            self._restack(wanted if within else mix.active)
        elif self._idle_uses > IDLE_USES:
            self._restack(mix.active)
        mix.stack = self._stack
        self._make_room()

    def _restack(self, names: frozenset[str]) -> None:
        """The branches follow one by one, as they are used."""
        self._stack, self._idle_uses = names, 0
        self._layouts.clear()

    def _make_room(self) -> None:
        """Drops the least recently used adapters beyond the limit from their device."""
        for name in self._stack:
            self._on_device.pop(name, None)
            self._on_device[name] = None
        if self._max_on_device is None:
            return
        for name in list(self._on_device)[: max(0, len(self._on_device) - max(self._max_on_device, len(self._stack)))]:
            del self._on_device[name]
            for site in self._sites.values():
                site.branch.drop(name)

    def _attach(self, path: str) -> None:
        module = self.model.get_submodule(path)
        shape = self._shapes[path]
        # A scaled embedding (Gemma) multiplies its whole output, so the adapter's part as well.
        scale = float(getattr(module, "embed_scale", 1.0))
        members = {path: slice(0, shape.inputs if shape.kind != "linear" else shape.outputs)}
        whole = {path: slice(0, shape.outputs)}
        branch = Branch(
            whole, shape.outputs, self._placed, layouts=self._layouts, embedding=shape.kind == "embedding", scale=scale
        )

        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            return None if self.mix is None else branch.add(inputs[0], output, self.mix)

        self._sites[path] = Site(module, members, branch, module.register_forward_hook(add))


def _slices(sizes: Iterable[int]) -> list[slice]:
    """Slices of these sizes, one behind the other."""
    ends = list(accumulate(sizes))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _fused(modules: Sequence[nn.Linear]) -> nn.Linear:
    """One Linear with the rows of all; the modules' own weights become views of its weight."""
    rows = _slices(module.out_features for module in modules)
    fused = nn.Linear(1, 1, bias=False)
    fused.in_features, fused.out_features = modules[0].in_features, rows[-1].stop
    fused.weight = nn.Parameter(torch.cat([module.weight.data for module in modules]), requires_grad=False)
    if any(module.bias is not None for module in modules):
        biases = [
            module.weight.new_zeros(module.out_features) if module.bias is None else module.bias.data
            for module in modules
        ]
        fused.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    for module, part in zip(modules, rows, strict=True):
        page_out(module.weight.data)
        module.weight.data = fused.weight.data[part]
    return fused


def module_shapes(model: nn.Module) -> dict[str, ModuleShape]:
    """The modules that LoRA can act on, by path: Linear, Conv1D, Embedding. Works on a model on the meta device."""
    found = {path: (module, kind) for path, module in model.named_modules() if (kind := _kind(module)) is not None}
    times = Counter(id(module.weight) for module, _ in found.values())
    return {
        path: ModuleShape(kind, *_sizes(module), tied=times[id(module.weight)] > 1)
        for path, (module, kind) in found.items()
    }


def _kind(module: nn.Module) -> str | None:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    return "embedding" if isinstance(module, nn.Embedding) else None


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs. A quantised Linear's weight may have another shape."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0]), int(weight.shape[1])


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which the model's activations are: that of what is not quantised, most often the embedding."""
    found = (parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point)
    return next(found, torch.float32)


def _check_fit(adapter: LoraAdapter, unfit: Mapping[str, str]) -> None:
    for path in adapter.modules.keys() & unfit.keys():
        raise AdapterError(
            f"adapter '{adapter.name}': it acts on {path}, where the embedded engine cannot add it to each token: "
            f"{unfit[path]}. Such an adapter is refused."
        )
