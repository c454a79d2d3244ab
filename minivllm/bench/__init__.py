"""Measurements: `minivllm bench ...`."""
