"""`driver: huggingface`: the embedded engine, which runs transformers' models in this process."""
