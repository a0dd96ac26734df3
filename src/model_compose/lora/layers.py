"""A torch model with adapters, and two ways to run a blend on it: live and folded.

Live: each adapted module adds what its branch computes (live.py). A hook does it; where modules are fused, a
Projection.

Folded: the weights are W + Σ w s B A, or W plus what another method makes of the deltas s B A. The sum is formed in
float32 and rounded once to W's dtype. LoraModel keeps the original weights, in the checkpoint's mapped pages if they
are mapped, and `unfold` puts them back. Nothing is ever subtracted.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
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
from model_compose.lora.live import Branch, Layouts, Mix, Placed, Selection
from model_compose.lora.methods import Method

IDLE_USES = 64
"""After this many passes without a request for it, an adapter leaves the stacks: the next request often comes soon."""


@dataclass(frozen=True)
class Placement:
    """The device and dtype in which one adapter computes. None is that of the base."""

    device: torch.device | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Site:
    """A weight that adapters act on.

    members: the paths of the modules that share this weight, each with its rows of the weight. handle: removes the
    hook.
    """

    module: nn.Module
    members: Mapping[str, slice]
    branch: Branch
    handle: RemovableHandle | None = None


@dataclass(frozen=True)
class Projection:
    """A Linear plus what the adapters add to it. Several Linears that read the same input may be fused into one."""

    module: nn.Module
    branch: Branch
    dtype: torch.dtype | None = None

    def __call__(self, x: Tensor, mix: Mix | None) -> Tensor:
        """x: (tokens, in) -> (tokens, out), in `dtype` or the module's own. Outputs of fused modules stand side by side."""
        y: Tensor = self.module(x)
        y = y if self.dtype is None else y.to(self.dtype)
        return y if mix is None else self.branch.add(x, y, mix)


class LoraModel:
    """A base model with its adapters: live by default, or with one blend folded into the weights.

    The base keeps its module tree, names and parameters. Adapters are added by forward hooks, which `fuse` replaces by
    Projections. Only one thread may use it at a time. Raises AdapterError if an adapter does not fit.

    max_on_device: how many adapters keep their factors on their device; those in use always do, and None keeps all.
    dtype: of the activations, if it is not that of the weights. holds: tells whether a tensor equals the base's
    parameter of that name; by default it is compared with the model's own, which must not be packed then.
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
        """The weights of the pass that is running. None if no adapter is in use, or if a blend is folded."""
        self.swaps = 0
        """How often the model's weights were exchanged.

        Pointers to weights hold as long as this number does not change.
        """
        self._placed: dict[str, Placed] = {}
        self._layouts = Layouts()
        self._max_on_device = max_on_device
        self._on_device: dict[str, None] = {}
        self._selection = Selection(frozenset())
        self._idle_uses = 0
        self._unfit: Mapping[str, str] = {}
        self._sites: dict[str, Site] = {}
        self._originals: dict[str, Tensor] = {}
        self._rested: dict[Method | None, tuple[Blend, dict[str, Tensor]]] = {}
        """Folded weights that are kept for later, with their blend: one for each method, where None is the sum."""
        self._shapes = module_shapes(model)
        self._dtype = dtype or _compute_dtype(model)
        for adapter in adapters:
            self.load(adapter, (placements or {}).get(adapter.name, Placement()))

    @property
    def adapters(self) -> Mapping[str, LoraAdapter]:
        # Other threads read this, too: copying the dict cannot be interrupted.
        return {name: placed.adapter for name, placed in self._placed.copy().items()}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._placed)

    def load(self, adapter: LoraAdapter, placement: Placement = Placement(), *, key: str | None = None) -> None:
        """Adds an adapter, live, under `key` or its own name.

        Raises AdapterError if it does not fit; then nothing has changed.
        """
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
        """Takes no adapter for these modules from now on. unfit: the reason for each path.

        Raises AdapterError if a loaded adapter acts on one of them.
        """
        self._unfit = unfit
        for adapter in self.adapters.values():
            _check_fit(adapter, unfit)

    def _has(self, name: str, copy: Tensor) -> bool:
        return is_copy(copy, dict(self.model.named_parameters(remove_duplicate=False)).get(name))

    def unload(self, name: str) -> None:
        """Removes an adapter. No request may use it any more."""
        del self._placed[name]
        self._on_device.pop(name, None)
        self._selection = Selection(self._selection.names - {name})
        for site in self._sites.values():
            site.branch.drop(name)
        if self.folded is not None and name in self.folded.active:
            self.unfold()
        self._rested = {method: kept for method, kept in self._rested.items() if name not in kept[0].active}

    @contextmanager
    def use(self, rows: Collection[Blend], counts: Collection[int] | None = None) -> Iterator[Mix | None]:
        """Within the `with` block, row i of every forward pass runs the blend rows[i].

        If a blend is folded, all rows must ask for it. counts: how many tokens each row has, if the batch is flat (all
        tokens in one line).
        """
        if self.folded is None:
            assert all(row.method is None for row in rows), "only sums run live"
            mix = Mix(rows, counts)
            self._select(mix)
            self.mix = mix if mix.active else None
        else:
            assert all(row.equals(self.folded) for row in rows), "another blend is folded in"
        try:
            yield self.mix
        finally:
            self.mix = None

    def fuse(
        self, paths: Collection[str], make: Callable[[nn.Linear], nn.Module] = lambda linear: linear
    ) -> Projection:
        """Fuses Linears that read the same input into one product, and returns it.

        From now on their adapters act in this Projection, no longer in the modules. The modules' weights become views
        of the fused weight. make: what the fused Linear is replaced by, such as a quantised one.
        """
        modules = [module for path in paths if isinstance(module := self.model.get_submodule(path), nn.Linear)]
        assert len(modules) == len(paths)
        rows = _slices(module.out_features for module in modules)
        members = dict(zip(paths, rows, strict=True))
        branch = Branch(members, rows[-1].stop, self._placed, layouts=self._layouts)
        linear = modules[0] if len(modules) == 1 else _fused(modules)
        site = Site(make(linear), members, branch)
        if site.module.weight is not linear.weight:  # free the plain weights, unless a tied embedding still uses them
            for module in modules:
                module.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        for path in paths:
            before = self._sites.get(path)
            if before is not None and before.handle is not None:
                before.handle.remove()
            self._sites[path] = site
        return Projection(site.module, branch)

    def embedding(self, path: str) -> Projection:
        """The embedding of this path as a Projection, in the activations' dtype.

        Its adapters no longer act in the module.
        """
        if path not in self._sites:
            self._attach(path)
        site = self._sites[path]
        if site.handle is not None:
            site.handle.remove()
        return Projection(site.module, site.branch, self._dtype)

    def fold(self, blend: Blend) -> None:
        """Adds the blend into the weights; only swaps them if it `keeps` the blend. No other blend runs until `unfold`."""
        if self.folded is not None and self.folded.equals(blend):
            return
        self.unfold(keep=True)
        self.swaps += 1
        rested = self._rested.pop(blend.method, None)
        if rested is not None and rested[0].equals(blend):
            self._originals = {path: swap(self._sites[path].module, new) for path, new in rested[1].items()}
            self.folded = blend
            return
        del rested  # frees the weights of another blend: their memory is needed now
        try:
            self._fold(blend)
        except Exception:  # such as no memory: a model that is folded in some modules only would be another function
            self.unfold()
            raise
        self.folded = blend

    def _fold(self, blend: Blend) -> None:
        for path in sorted({path for name in blend.active for path in self._placed[name].adapter.modules}):
            site = self._sites[path]
            first = next(iter(site.members))
            if first in self._originals:  # a fused weight is folded once, for all its members
                continue
            untie(self.model, site.module)
            weight = site.module.weight
            assert isinstance(weight, nn.Parameter)
            self._originals[first] = swap(site.module, self._folded(weight.data, site, blend))
            page_out(self._originals[first])

    def can_fold(self, blend: Blend) -> bool:
        """Whether the weights that the blend changes are plain numbers.

        Packed weights (bitsandbytes) cannot be folded.
        """
        sites = [self._sites[path] for name in blend.active for path in self._placed[name].adapter.modules]
        weights = [site.module.weight for site in sites]
        return all(isinstance(weight, Tensor) and weight.is_floating_point() and weight.numel() for weight in weights)

    def fold_bytes(self, blend: Blend) -> int:
        """How many bytes of weights folding this blend would write."""
        paths = {path for name in blend.active for path in self._placed[name].adapter.modules}
        modules = {self._sites[path].module for path in paths}
        return sum(module.weight.nbytes for module in modules if isinstance(module.weight, Tensor))

    def keeps(self, blend: Blend) -> bool:
        """Whether the folded weights of this blend are kept, so that folding it only swaps weights."""
        rested = self._rested.get(blend.method)
        return rested is not None and rested[0].equals(blend)

    def unfold(self, *, keep: bool = False) -> None:
        """Puts the original weights back.

        keep: keeps the folded weights, so that folding the same blend again only swaps weights, until another blend by
        the same method is folded.
        """
        self.swaps += 1
        swapped = {path: swap(self._sites[path].module, original) for path, original in self._originals.items()}
        if self.folded is not None and keep:
            self._rested[self.folded.method] = (self.folded, swapped)
        self._originals = {}
        self.folded = None

    def _folded(self, weight: Tensor, site: Site, blend: Blend) -> Tensor:
        """W + Σ w s B A as a new tensor.

        Weights of Conv1D and embeddings are (in, out), so they get the transposed sum.
        """
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

    def _select(self, mix: Mix) -> None:
        """Chooses the adapters to stack for this mix.

        Keeps the last selection as long as it contains the mix's adapters: making new stacks takes longer than
        multiplying by a few unused ranks for a while.
        """
        selected = self._selection.names
        self._idle_uses = self._idle_uses + 1 if mix.active < selected else 0
        if not mix.active <= selected:
            wanted = selected | mix.active
            within = self._max_on_device is None or len(wanted) <= self._max_on_device
            self._change_selection(wanted if within else mix.active)
        elif self._idle_uses > IDLE_USES:
            self._change_selection(mix.active)
        mix.selection = self._selection
        self._make_room()

    def _change_selection(self, names: frozenset[str]) -> None:
        """Each branch makes its new stacks when it is next used."""
        self._selection, self._idle_uses = Selection(names), 0
        self._layouts.forget()

    def _make_room(self) -> None:
        """Frees the factors of the least recently used adapters on their device, until the limit is kept."""
        for name in self._selection.names:
            self._on_device.pop(name, None)
            self._on_device[name] = None
        if self._max_on_device is None:
            return
        limit = max(self._max_on_device, len(self._selection.names))
        for name in list(self._on_device)[: max(0, len(self._on_device) - limit)]:
            del self._on_device[name]
            for site in self._sites.values():
                site.branch.drop(name)

    def _attach(self, path: str) -> None:
        module = self.model.get_submodule(path)
        shape = self._shapes[path]
        # An embedding with a scale (Gemma) multiplies its whole output by it, so the adapters' part, too.
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
    """Slices of these sizes, one after the other."""
    ends = list(accumulate(sizes))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _fused(modules: list[nn.Linear]) -> nn.Linear:
    """One Linear with the rows of all of them. The modules' weights become views of its weight."""
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
    """The modules that LoRA can act on (Linear, Conv1D, Embedding), by path. The model may be on the meta device."""
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
    """Inputs and outputs. They are not read off the weight: that of a quantised Linear may have another shape."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0]), int(weight.shape[1])


def _compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's activations: that of its first parameter that is not quantised, usually the embedding."""
    found = (parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point)
    return next(found, torch.float32)


def _check_fit(adapter: LoraAdapter, unfit: Mapping[str, str]) -> None:
    for path in adapter.modules.keys() & unfit.keys():
        raise AdapterError(
            f"adapter '{adapter.name}': it acts on {path}, where the embedded engine cannot add it to each token: "
            f"{unfit[path]}. Such an adapter is refused."
        )
