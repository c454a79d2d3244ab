"""Triton kernels of minivllm: plain tensors in, plain tensors out; imports torch and triton only."""
