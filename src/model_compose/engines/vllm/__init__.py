"""`driver: vllm`: an engine that runs vLLM's server."""
