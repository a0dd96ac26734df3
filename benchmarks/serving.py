"""Claim: over HTTP, blends cost little, many blends at once cost no more than one, and loaded adapters cost nothing.

    python -m benchmarks.serving                                                    # ours: the base and its blends
    python -m benchmarks.serving --systems ours vllm llamacpp peft transformers static \\
        --vllm-python ~/vllm/bin/python --llamacpp-python ~/llamacpp/bin/python --baseline vllm:own
    python -m benchmarks.serving --systems ours ours+int8 ours+live --blends one     # variants of ours
    python -m benchmarks.serving --systems before ours --before ../old --blends own --pairs 3    # did a change cost speed?
    python -m benchmarks.serving --ttft-under-load                                   # a short prompt among 15 others
    python -m benchmarks.serving --adapters-loaded 1 8 32                            # requests use two of them

Each system is a server on this machine. Streaming requests arrive at the same time, with prompts of 48 tokens that share no
beginning, and generate 128 greedy tokens (EOS is ignored). The model is SmolLM2-135M-Instruct with four random adapters of
rank 8 on q, k, v and o.

Blends: `base` uses no adapter; `one` is the same blend of two adapters for all requests; with `own`, each request has its
own weights for all four. vllm cannot blend, so with `own` each of its requests uses one of the four (a quarter of the
rank). llamacpp serves a Q4_1 file of the same weights without blends; it and peft answer one request at a time. A variant
is NAME+OPTION, where OPTION is float32, bfloat16, int8, int4, fold, live, or a number of loaded adapters (vllm+0 is vLLM
without LoRA).

All servers start at the beginning. They are measured in turns, every second round in reverse order, and idle otherwise.
Printed for each: total tokens per second (median and its 95 % interval), the ratio to the baseline in the same round
(median, lowest, highest), and over all requests the time to the first token and the time per further token.
"""

import argparse
import asyncio
import dataclasses
import itertools
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from pathlib import Path

from benchmarks.peers.load import Prompts, Query, Wave, ask_under_load, create_client, send_wave
from benchmarks.peers.report import Series, milliseconds, plot, rows, spread
from benchmarks.peers.systems import BLENDS, Setting, System, SystemFailed, make_system, running
from benchmarks.peers.weights import Weights, prepare

WEIGHTS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "model-compose" / "benchmarks"
SHORT_PROMPT = 16
LOADED = 16
"""The number of concurrent requests in --ttft-under-load, including the late one."""

Cell = tuple[System, str]
Measure = Callable[[Cell], Awaitable[Wave]]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--systems", nargs="+", default=["ours"], metavar="NAME[+OPTION…]", help="the systems to compare")
    add("--blends", nargs="+", choices=BLENDS, default=["base", "one", "own"], help="the blends that requests use")
    add("--concurrency", nargs="+", type=int, default=[1, 4, 16, 64], help="concurrent requests")
    add("--serial-up-to", type=int, default=4, help="highest concurrency for systems that answer one request at a time")
    add("--pairs", type=int, default=10, help="number of rounds")
    add("--baseline", metavar="SYSTEM:BLEND", help="what ratios compare with; default: the first system and blend")
    add("--prompt-tokens", type=int, default=48)
    add("--tokens", type=int, default=128, help="tokens of an answer")
    add("--shared-prefix", type=int, default=0, metavar="TOKENS", help="let all prompts begin with the same N tokens")
    add("--ttft-under-load", action="store_true", help="measure a short prompt's first token, alone and under load")
    add("--adapters-loaded", nargs="+", type=int, metavar="N", help="give each system N adapters; requests use two")
    add("--precision", choices=["float32", "bfloat16"], default="float32", help="for all systems except llamacpp")
    add("--quantization", choices=["int8", "int4"], help="for ours")
    add("--fold", choices=["auto", "never", "always"], help="for ours; default: the engine's own")
    add("--max-batch-size", type=int, help="for all systems that batch; default: the highest concurrency")
    add("--vllm-python", metavar="PATH")
    add("--vllm-arguments", default="", metavar="'--OPTION …'", help="further options for vLLM's server")
    add("--llamacpp-python", metavar="PATH")
    add("--before", type=Path, metavar="FOLDER", help="another checkout of this repository, for the system `before`")
    add("--weights", type=Path, default=WEIGHTS, help="folder of base and adapters; created if missing")
    add("--start-timeout", type=float, default=300, metavar="SECONDS")
    add("--json", type=Path, metavar="FILE", help="write every sample")
    add("--plot", type=Path, metavar="FILE.png", help="throughput over concurrency; needs matplotlib")
    return parser.parse_args()


def make_systems(arguments: argparse.Namespace, weights: Weights, eos: int, folder: Path) -> list[System]:
    at_once = LOADED if arguments.ttft_under_load else max(arguments.concurrency)
    setting = Setting(
        weights, eos, arguments.max_batch_size or at_once, precision=arguments.precision,
        quantization=arguments.quantization, fold=arguments.fold, vllm_python=arguments.vllm_python,
        vllm_arguments=arguments.vllm_arguments, llamacpp_python=arguments.llamacpp_python,
        before=arguments.before and arguments.before.resolve(),
    )  # fmt: skip
    specs = arguments.systems
    if arguments.adapters_loaded:
        specs = [f"{spec}+{count}" for spec in specs for count in arguments.adapters_loaded]
    return [make_system(spec, setting, folder) for spec in dict.fromkeys(specs)]


def most_adapters(arguments: argparse.Namespace) -> int:
    written: list[int] = [int(part) for spec in arguments.systems for part in spec.split("+") if part.isdecimal()]
    loaded: list[int] = arguments.adapters_loaded or []
    return max([4, *loaded, *written])


def choose_cells(systems: Collection[System], blends: Collection[str]) -> list[Cell]:
    """The pairs of system and blend that can be measured. Prints to stderr which cannot."""
    for system in systems:
        if lacking := [blend for blend in blends if blend not in system.blends]:
            print(f"{system.label} has no {', '.join(lacking)}: not measured", file=sys.stderr)
    return [(system, blend) for system in systems for blend in blends if blend in system.blends]


def without_serial(cells: Collection[Cell], at_once: int, most: int) -> list[Cell]:
    """The cells to measure with `at_once` requests: beyond `most`, only systems that batch. Prints the others to stderr."""
    if at_once <= most:
        return list(cells)
    for label in dict.fromkeys(system.label for system, _ in cells if system.serial):
        print(f"{label} answers one at a time: not measured with {at_once} at once", file=sys.stderr)
    return [(system, blend) for system, blend in cells if not system.serial]


def choose_baseline(wanted: str | None, cells: Collection[Cell]) -> str:
    """The baseline's label. Raises SystemFailed if it is not measured."""
    known = [f"{system.label}:{blend}" for system, blend in cells]
    if not known or (wanted and wanted not in known):
        raise SystemFailed(f"--baseline: '{wanted}' is not measured; there are {', '.join(known) or 'none'}")
    return wanted or known[0]


async def in_turns(cells: list[Cell], pairs: int, concurrency: int, measure: Measure) -> list[list[Wave]]:
    """Measure all cells in turns. Returns waves by cell, then by round, without the first round, which is a warm-up."""
    waves: list[list[Wave]] = [[] for _ in cells]
    for number in range(pairs + 1):
        order = range(len(cells)) if number % 2 else reversed(range(len(cells)))
        for index in order:
            wave = await measure(cells[index])
            if number:
                waves[index].append(wave)
        print(f"{concurrency} at once: round {number} of {pairs}", file=sys.stderr, flush=True)
    return waves


@dataclasses.dataclass
class Load:
    """Makes the queries of waves. No query is used twice, so that prefix caches do not help."""

    prompts: Prompts
    prompt_tokens: int
    tokens: int
    shared: str = ""
    rows: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def queries(self, count: int) -> list[Query]:
        return [
            Query(next(self.rows), self.shared + self.prompts.take(self.prompt_tokens), self.tokens)
            for _ in range(count)
        ]

    def short(self) -> Query:
        return Query(next(self.rows), self.prompts.take(SHORT_PROMPT), tokens=2)


async def throughput(
    arguments: argparse.Namespace, possible: Collection[Cell], load: Load, measured: list[Series]
) -> None:
    """Measure throughput. Appends to `measured` after each concurrency, so that a late failure loses little."""
    baseline = choose_baseline(arguments.baseline, possible)
    async with create_client() as client:
        for at_once in arguments.concurrency:
            cells = without_serial(possible, at_once, arguments.serial_up_to)
            if not cells:
                continue

            async def measure(cell: Cell, at_once: int = at_once) -> Wave:
                return await send_wave(client, *cell, load.queries(at_once))

            waves = await in_turns(cells, arguments.pairs, at_once, measure)
            block = [
                Series(system.label, blend, at_once, [w.tokens_per_second for w in rounds], [w.answers for w in rounds])
                for (system, blend), rounds in zip(cells, waves, strict=True)
            ]
            print(f"\n{at_once} at once", *rows(block, baseline), sep="\n", flush=True)
            measured += block


async def ttft_under_load(
    arguments: argparse.Namespace, possible: Collection[Cell], load: Load, measured: list[Series]
) -> None:
    """Measure the time to the first token of a prompt of SHORT_PROMPT tokens, alone and while LOADED - 1 others decode.

    Appends series of seconds to `measured`.
    """
    cells = without_serial(possible, LOADED, most=1)
    async with create_client() as client:

        async def measure(cell: Cell) -> Wave:
            alone = await send_wave(client, *cell, [load.short()])
            late = await ask_under_load(client, *cell, load.queries(LOADED - 1), load.short())
            return Wave(alone.seconds, (*alone.answers, late))

        waves = await in_turns(cells, arguments.pairs, LOADED, measure)
    print(f"\nfirst token of a prompt of {SHORT_PROMPT}, ms: alone; while {LOADED - 1} others decode; ratio")
    for (system, blend), rounds in zip(cells, waves, strict=True):
        alone, late = (
            Series(system.label, blend, n, [w.answers[i].first for w in rounds], [(w.answers[i],) for w in rounds])
            for i, n in enumerate((1, LOADED))
        )
        print(f"{alone.cell:24} {milliseconds(alone)}  {milliseconds(late)}  {spread(late, alone)}", flush=True)
        measured += [alone, late]


def describe_machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    vectors = sorted(flag for flag in facts.get("flags", "").split() if flag.startswith(("avx", "amx")))
    return {"cpu": facts.get("model name", platform.processor()), "cores": os.cpu_count(), "vectors": vectors}


def write_json(
    arguments: argparse.Namespace, systems: Collection[System], measured: Collection[Series], started: float
) -> None:
    document = {
        "machine": describe_machine(),
        "versions": {system.label: system.versions() for system in systems},
        "seconds": time.time() - started,
        "arguments": {
            name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()
        },
        "series": [dataclasses.asdict(series) for series in measured],
    }
    arguments.json.write_text(json.dumps(document, indent=1), encoding="utf-8")


def main() -> None:
    arguments, started = parse(), time.time()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # raise, so that the servers are stopped too
    weights = prepare(arguments.weights, most_adapters(arguments))
    prompts = Prompts(weights.base("float32"))
    shared = prompts.take(arguments.shared_prefix) if arguments.shared_prefix else ""
    load = Load(prompts, arguments.prompt_tokens, arguments.tokens, shared)
    compare = ttft_under_load if arguments.ttft_under_load else throughput
    measured: list[Series] = []
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        try:
            systems = make_systems(arguments, weights, prompts.eos, Path(folder))
            cells = choose_cells(systems, ["two"] if arguments.adapters_loaded else arguments.blends)
            choose_baseline(arguments.baseline, cells)  # fails before any server is started
            with running(list(dict.fromkeys(system for system, _ in cells)), arguments.start_timeout):
                asyncio.run(compare(arguments, cells, load, measured))
        except SystemFailed as failed:
            raise SystemExit(str(failed)) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None
        finally:
            if measured and arguments.json:
                write_json(arguments, systems, measured, started)
    if arguments.plot and not arguments.ttft_under_load:
        plot(measured, f"{arguments.prompt_tokens} tokens in, {arguments.tokens} out", arguments.plot)


if __name__ == "__main__":
    main()
