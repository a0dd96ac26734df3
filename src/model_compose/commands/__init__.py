"""The commands that are longer than a few lines. cli.py registers them."""
