"""`driver: vllm`: vLLM's server as the engine."""
