"""What stands in for vLLM's server where none is installed: the routes that the driver speaks, and an endless text.

Installed as vllm.entrypoints.openai.api_server of a small environment; the standard library alone. It says one token every
20 ms, takes adapters up to --max-lora-rank, and ends where the prompt starts with the token CRASH.
"""

import argparse
import json
import os
import socketserver
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CRASH = 57
"""The byte X, as tests/tiny.py has it."""
TOKEN = 43
METRICS = b"""\
vllm:num_requests_running{engine="0"} 3.0
vllm:kv_cache_usage_perc{engine="0"} 0.5
vllm:cache_config_info{block_size="16",num_gpu_blocks="10"} 1.0
"""

arguments: dict[str, str] = {}
adapters: dict[str, str] = {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.answer(200, {"data": [{"id": "base", "parent": None, "max_model_len": 256}]})
        elif self.path == "/adapters":  # of this one alone
            self.send(200, json.dumps(list(adapters)).encode())
        elif self.path == "/metrics":
            self.send(200, METRICS)
        else:
            self.answer(200, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/load_lora_adapter":
            self.load(body)
        elif self.path == "/v1/unload_lora_adapter":
            adapters.pop(body["lora_name"], None)
            self.answer(200, {})
        elif body["model"] != "base" and body["model"] not in adapters:
            self.fail(404, f"The model `{body['model']}` does not exist.")
        else:
            self.complete(body)

    def load(self, body: dict[str, Any]) -> None:
        config = json.loads(Path(body["lora_path"], "adapter_config.json").read_text())
        if any("mlp" in path for path in config["target_modules"]) and "NO_MLP" in os.environ:
            return self.fail(500, "expected target modules in {'q_proj'} but received ['mlp']")
        if config["r"] > int(arguments["max_lora_rank"]):
            return self.fail(500, f"LoRA rank {config['r']} is greater than max_lora_rank")
        adapters[body["lora_name"]] = body["lora_path"]
        print(f"INFO loaded {body['lora_name']}", flush=True)
        return self.answer(200, {})

    def complete(self, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(1, body["max_tokens"] + 1):
            end = "length" if number == body["max_tokens"] else None
            self.event({"choices": [{"index": 0, "token_ids": [TOKEN], "finish_reason": end}]})
            if body["prompt"][0] == CRASH and number == 3:
                os._exit(7)
            time.sleep(0.02)
        self.event({"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": len(adapters)}}})
        self.wfile.write(b"0\r\n\r\n")

    def event(self, content: dict[str, Any]) -> None:
        data = f"data: {json.dumps(content)}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def fail(self, status: int, message: str) -> None:
        self.answer(status, {"error": {"message": message, "code": status}})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        self.send(status, json.dumps(content).encode())

    def send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None: ...


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("uds", "port", "max-lora-rank"):
        parser.add_argument(f"--{name}")
    arguments.update(vars(parser.parse_known_args()[0]))
    if arguments["uds"]:
        Server(arguments["uds"], Handler).serve_forever()
    else:
        ThreadingHTTPServer(("127.0.0.1", int(arguments["port"])), Handler).serve_forever()
