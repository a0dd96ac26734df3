"""A server of plain transformers, with PEFT for adapters: `model.generate` for up to --batch requests at a time.

    python -m benchmarks.peers.transformers_app --base FOLDER --dtype float32 --port 8000 [--batch 16] [NAME=FOLDER …]

What one writes oneself around the two libraries. A batch starts when the one before it has ended; with adapters the batch
is one request, whose blend PEFT makes with combination_type="cat" when it differs from the one before. EOS is ignored.
"""

import argparse
import asyncio
import json
import os
import queue
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import Body, FastAPI
from fastapi.responses import StreamingResponse
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

GATHER_SECONDS = 0.05
"""How long a batch waits for more requests than its first."""
BLEND = "blend"


@dataclass
class Job:
    """One request. lora: weights by adapter, None for the bare base. texts: what is sent, None at the end."""

    prompt: str
    tokens: int
    lora: dict[str, float] | None
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    texts: asyncio.Queue[str | None] = field(default_factory=asyncio.Queue)

    def put(self, text: str | None) -> None:
        self.loop.call_soon_threadsafe(self.texts.put_nowait, text)


class Rows(BaseStreamer):
    """Sends each row's next token to the row's job; transformers' own streamers take one row only."""

    def __init__(self, jobs: Collection[Job], tokenizer: Any) -> None:
        self._jobs, self._tokenizer = jobs, tokenizer
        self._steps = -1

    def put(self, value: torch.Tensor) -> None:
        """value: the prompts (rows, length) at first, then a token for each row."""
        self._steps += 1
        if self._steps:
            for job, token in zip(self._jobs, value.tolist(), strict=True):
                if self._steps <= job.tokens:
                    job.put(self._tokenizer.decode([token]))

    def end(self) -> None:
        for job in self._jobs:
            job.put(None)


class Generator:
    """The model and the thread that runs it."""

    def __init__(self, base: Path, dtype: str, adapters: dict[str, str], batch: int) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        self._model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        self._model.generation_config.eos_token_id = None
        self._batch = batch
        self._blend: dict[str, float] | None = None
        for name, folder in adapters.items():
            self._load_adapter(name, folder)
        self.jobs: queue.Queue[Job] = queue.Queue()
        threading.Thread(target=self._run, daemon=True).start()

    def _load_adapter(self, name: str, folder: str) -> None:
        from peft import PeftModel

        if isinstance(self._model, PeftModel):
            self._model.load_adapter(folder, adapter_name=name)
        else:
            self._model = PeftModel.from_pretrained(self._model, folder, adapter_name=name)

    def _run(self) -> None:
        while True:
            jobs = [self.jobs.get()]
            deadline = time.monotonic() + GATHER_SECONDS
            try:
                while len(jobs) < self._batch:
                    jobs.append(self.jobs.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                pass
            try:
                self._generate(jobs)
            except Exception:  # nobody shall wait for a thread that has ended
                traceback.print_exc()
                os._exit(1)

    @torch.inference_mode()
    def _generate(self, jobs: list[Job]) -> None:
        inputs = self._tokenizer([job.prompt for job in jobs], return_tensors="pt", padding=True)
        options = {
            "max_new_tokens": max(job.tokens for job in jobs),
            "do_sample": False,
            "streamer": Rows(jobs, self._tokenizer),
        }
        lora = jobs[0].lora
        if lora:
            self._set_blend(lora)
            self._model.generate(**inputs, **options)
        elif hasattr(self._model, "disable_adapter"):
            with self._model.disable_adapter():
                self._model.generate(**inputs, **options)
        else:
            self._model.generate(**inputs, **options)

    def _set_blend(self, lora: dict[str, float]) -> None:
        if lora == self._blend:
            return
        if self._blend is not None:
            self._model.delete_adapter(BLEND)
        self._model.add_weighted_adapter(list(lora), list(lora.values()), BLEND, combination_type="cat")
        self._model.set_adapter(BLEND)
        self._blend = lora


def create_app(generator: Generator) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> dict[str, object]:
        return {"object": "list", "data": [{"id": "base", "object": "model"}]}

    @app.post("/v1/completions")
    async def completions(body: Annotated[dict[str, Any], Body()]) -> StreamingResponse:
        job = Job(body["prompt"], body["max_tokens"], body.get("lora"))
        generator.jobs.put(job)
        return StreamingResponse(_events(job), media_type="text/event-stream")

    return app


async def _events(job: Job) -> AsyncGenerator[str]:
    tokens = 0
    while (text := await job.texts.get()) is not None:
        tokens += 1
        yield _event({"choices": [{"index": 0, "text": text, "finish_reason": None}]})
    yield _event({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
    yield _event({"choices": [], "usage": {"completion_tokens": tokens}})
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("adapters", nargs="*", metavar="NAME=FOLDER")
    arguments = parser.parse_args()
    adapters = dict(pair.split("=", 1) for pair in arguments.adapters)
    if adapters and arguments.batch > 1:
        parser.error("--batch: PEFT's generate takes one blend at a time; leave the adapters out, or --batch")
    generator = Generator(arguments.base, arguments.dtype, adapters, arguments.batch)
    uvicorn.run(create_app(generator), host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
