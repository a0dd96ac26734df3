"""LoRA adapters and their exact weighted sum. Nothing in this package knows of YAML, engines or servers."""
