"""Serve a base language model plus several weighted LoRA adapters, blended exactly, from one YAML file.

async with Compose.open("model-compose.yml") as compose:
    done = await compose.answer({"prompt": "Hello"}, blend={"alpaca": 0.7})
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_compose import errors as errors
    from model_compose.compose import Compose as Compose
    from model_compose.lora.blend import Blend as Blend

try:
    __version__ = version("model-compose-lora")
except PackageNotFoundError:  # the source tree is on the path, and not installed
    __version__ = "0+unknown"

_PUBLIC = {"Compose": "model_compose.compose", "Blend": "model_compose.lora.blend"}


def __getattr__(name: str) -> Any:
    """Imports the public names on first use, so that the command line starts without them."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'model_compose' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)
