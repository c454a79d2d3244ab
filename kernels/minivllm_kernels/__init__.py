"""Triton kernels of minivllm: plain tensors in, plain tensors out; imports torch and triton only.

The README says in which order to read them, `fastest.py` which one answers where.
"""
