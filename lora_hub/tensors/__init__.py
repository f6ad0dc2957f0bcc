"""Safetensors by ourselves: a strict header, exact reading, streaming writing."""
