"""LoRA adapters and their exact weighted sum. Knows nothing of YAML, engines or servers."""
