"""Blends as stacked adapters on disk: exact, loaded once, the least recently used evicted, those in use kept."""

import asyncio
import os
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch

from model_compose.engines.served.compiled import Compiled
from model_compose.errors import AdapterError
from model_compose.lora.adapter import Factors, LoraAdapter, read_adapter
from model_compose.lora.blend import Blend
from tests.waiting import until

FIRST, SECOND = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def adapter(name: str, modules: dict[str, tuple[int, float]]) -> LoraAdapter:
    """Random factors of (12, 16) modules. modules: rank and scaling by path."""
    generator = torch.Generator().manual_seed(len(name))
    factors = {
        path: Factors(torch.randn(rank, 16, generator=generator), torch.randn(12, rank, generator=generator), scaling)
        for path, (rank, scaling) in modules.items()
    }
    return LoraAdapter(name, factors, digest=name)


ADAPTERS = {
    each.name: each for each in (adapter("a", {FIRST: (3, 2.0)}), adapter("bb", {FIRST: (5, 0.25), SECOND: (2, 1.0)}))
}


class Loader:
    """What an engine does with stacked adapters, written down."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.folders: dict[str, Path] = {}
        self.broken = False
        self.gate = asyncio.Event()
        self.gate.set()

    async def load(self, name: str, folder: Path) -> None:
        self.calls.append(f"+{name.rpartition('-')[2]}")
        await self.gate.wait()
        if self.broken:
            raise AdapterError("broken")
        assert (folder / "adapter_config.json").is_file()
        self.folders[name] = folder

    async def unload(self, name: str) -> None:
        self.calls.append(f"-{name.rpartition('-')[2]}")
        del self.folders[name]


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def compiled(tmp_path: Path, loader: Loader) -> Compiled:
    return Compiled(tmp_path, 2, loader.load, loader.unload)


async def use(compiled: Compiled, identity: str) -> str:
    async with compiled.use(identity, Blend({"a": 1.0}), ADAPTERS) as name:
        return name


async def test_the_folder_is_the_weighted_sum(compiled: Compiled, loader: Loader) -> None:
    weights = {"a": 0.7, "bb": -1.5}
    async with compiled.use("x", Blend(weights), ADAPTERS) as name:
        stacked = read_adapter(loader.folders[name], "stacked")
    assert {path: factors.rank for path, factors in stacked.modules.items()} == {FIRST: 8, SECOND: 2}
    for path, factors in stacked.modules.items():
        assert factors.scaling == 1.0  # also for engines that know no alpha_pattern: it is 1 in every module
        dense = torch.zeros(12, 16, dtype=torch.float64)
        for adapter, weight in weights.items():
            if part := ADAPTERS[adapter].modules.get(path):
                dense += weight * part.scaling * (part.b.double() @ part.a.double())
        ours = factors.b.double() @ factors.a.double()
        assert (ours - dense).abs().max() / dense.abs().max() < 1e-6


async def test_the_least_recently_used_leaves_and_takes_its_files_along(
    compiled: Compiled, loader: Loader, tmp_path: Path
) -> None:
    for identity in ("x", "y", "x", "z", "x", "y"):
        await use(compiled, identity)
    assert loader.calls == ["+x", "+y", "-y", "+z", "-z", "+y"]
    assert len(os.listdir(tmp_path)) == 2


async def test_one_load_for_uses_at_once(compiled: Compiled, loader: Loader) -> None:
    loader.gate.clear()
    uses = [asyncio.create_task(use(compiled, "x")) for _ in range(3)]
    await until(lambda: loader.calls)
    uses[0].cancel()  # the one that began the load
    loader.gate.set()
    assert len(set(await asyncio.gather(*uses[1:]))) == 1
    assert loader.calls == ["+x"]


async def test_those_in_use_stay_and_a_further_one_waits(compiled: Compiled, loader: Loader) -> None:
    async with AsyncExitStack() as stack:
        for identity in ("x", "y", "x"):
            await stack.enter_async_context(compiled.use(identity, Blend({"a": 1.0}), ADAPTERS))
        leaving, waiting = asyncio.create_task(use(compiled, "u")), asyncio.create_task(use(compiled, "z"))
        await until(lambda: len(compiled._in_use._waiters or ()) == 2)
        assert loader.calls == ["+x", "+y"]
        await use(compiled, "y")  # what is in use already waits for nobody
        leaving.cancel()
    await waiting
    assert loader.calls[2] in ("-x", "-y")
    assert loader.calls[3:] == ["+z"]


async def test_a_load_that_fails_is_tried_again(compiled: Compiled, loader: Loader, tmp_path: Path) -> None:
    loader.broken = True
    results = await asyncio.gather(*(use(compiled, "x") for _ in range(2)), return_exceptions=True)
    assert [str(result) for result in results] == ["broken", "broken"]
    assert os.listdir(tmp_path) == []
    loader.broken = False
    for identity in ("x", "y", "z"):
        await use(compiled, identity)
    assert loader.calls == ["+x", "+x", "+y", "-x", "+z"]


async def test_what_the_engine_has_lost_is_loaded_again(compiled: Compiled, loader: Loader, tmp_path: Path) -> None:
    async with compiled.use("x", Blend({"a": 1.0}), ADAPTERS):
        compiled.clear()
        assert os.listdir(tmp_path) == []
    await use(compiled, "x")
    assert loader.calls == ["+x", "+x"]
    assert len(compiled.names) == 1
