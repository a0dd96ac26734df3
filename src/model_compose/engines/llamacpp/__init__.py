"""`driver: llamacpp`: llama.cpp with a GGUF base, in this process or as a llama-server process."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from model_compose.engines import Engine
from model_compose.engines.llamacpp import options as own
from model_compose.engines.llamacpp.options import find
from model_compose.engines.options import ModelOptions
from model_compose.lora.adapter import LoraAdapter
from model_compose.lora.blend import Blends
from model_compose.schema import Options


class LlamacppDriver:
    """Chooses how llama.cpp runs: as the llama-server that `options.server` names, or else here, by llama-cpp-python."""

    Options: ClassVar[type[Options]] = own.LlamacppOptions
    needs = None
    refuse = staticmethod(own.refuse)

    def preflight(self, options: ModelOptions, adapters: Mapping[str, LoraAdapter], base_dir: Path) -> None:
        assert isinstance(options.options, own.LlamacppOptions)
        if options.options.server is not None:
            find(options.options.server, base_dir)

    def __call__(self, options: ModelOptions, blends: Blends, base_dir: Path) -> Engine:
        assert isinstance(options.options, own.LlamacppOptions)
        if options.options.server is None:
            from model_compose.engines.llamacpp.embedded import EmbeddedEngine

            return EmbeddedEngine(options, blends, base_dir)
        from model_compose.engines.llamacpp.server import ServerEngine

        return ServerEngine(options, blends, base_dir)


DRIVER = LlamacppDriver()
