"""Reads a base's weights from disk one tensor at a time, by their stored names, and writes them as safetensors files."""
