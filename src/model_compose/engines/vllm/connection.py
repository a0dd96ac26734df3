"""Requests to a vLLM server other than those for text: its model, its adapters and its metrics."""

from dataclasses import dataclass
from pathlib import Path

import httpx

from model_compose.engines import Stats
from model_compose.engines.served import connection
from model_compose.engines.served.connection import error_of
from model_compose.errors import AdapterError, InputError, LoadError


@dataclass(frozen=True)
class Served:
    """The base model on the server. name: its model id. context: the most tokens of a prompt with its answer."""

    name: str
    context: int


class Connection(connection.Connection):
    """A vLLM server."""

    async def served(self) -> Served:
        """The server's base model. Raises LoadError if the server cannot be reached, refuses us, or is not vLLM."""
        try:
            response = await self.client.get("/v1/models")
        except httpx.TransportError as error:
            raise LoadError(
                f"the vLLM server at {self.url} cannot be reached ({error}); start it, or correct base_url"
            ) from None
        if response.status_code in (401, 403):
            raise LoadError(f"the vLLM server at {self.url} refuses the api_key")
        if not response.is_success:
            raise LoadError(f"the vLLM server at {self.url} does not list its models: {error_of(response)}")
        try:
            models = [model for model in response.json()["data"] if not model.get("parent")]
            return Served(str(models[0]["id"]), int(models[0]["max_model_len"]))
        except (ValueError, LookupError, TypeError):
            raise LoadError(f"the server at {self.url} is not vLLM: its models have no max_model_len") from None

    async def load(self, name: str, folder: Path) -> None:
        """Load a PEFT folder. Raises InputError if its rank is too large, else AdapterError with vLLM's message."""
        response = await self.client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": str(folder)})
        if response.is_success:
            return
        if response.status_code in (404, 405) and "error" not in response.text:
            raise AdapterError(
                f"the vLLM server at {self.url} cannot load adapters; start it with --enable-lora and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            )
        message = error_of(response)
        if "max_lora_rank" in message:
            raise InputError(f"vLLM has no room for this blend: {message}", field="blend")
        raise AdapterError(f"vLLM does not take it: {message}")

    async def unload(self, name: str) -> None:
        """Unload an adapter. No error if it is not loaded."""
        await self.client.post("/v1/unload_lora_adapter", json={"lora_name": name})

    async def stats(self, kv_bytes_per_token: int, adapters: int) -> Stats:
        """The numbers in /metrics. Raises httpx.HTTPError, and ValueError for an answer that is not metrics."""
        from prometheus_client.parser import text_string_to_metric_families

        text = (await self.client.get("/metrics")).raise_for_status().text
        found: dict[str, float] = {}
        total = 1
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0.0) + sample.value  # over data-parallel engines
                if sample.name == "vllm:cache_config_info":
                    blocks, size = sample.labels.get("num_gpu_blocks", ""), sample.labels.get("block_size", "")
                    if blocks.isdecimal() and size.isdecimal():
                        total = int(blocks) * int(size) * kv_bytes_per_token

        def count(name: str) -> int:
            return int(found.get(f"vllm:{name}", 0))

        return Stats(
            running=count("num_requests_running"), waiting=count("num_requests_waiting"),
            kv_cache_used=int(found.get("vllm:kv_cache_usage_perc", 0.0) * total), kv_cache_total=total,
            prefix_queries=count("prefix_cache_queries_total"), prefix_hits=count("prefix_cache_hits_total"),
            preemptions=count("num_preemptions_total"), adapters=adapters,
        )  # fmt: skip
