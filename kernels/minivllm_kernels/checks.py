"""What every launcher checks before a pointer leaves Python: a kernel that is handed nonsense reads foreign memory."""

import torch
import triton

from minivllm_kernels.configs import device_class

HEAD_SIZES = (64, 80, 96, 128, 256)
BLOCK_SIZES = (1, 8, 16, 32, 64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def require(holds: bool, message: str) -> None:
    """Raise ValueError with one line that says what to change."""
    if not holds:
        raise ValueError(message)


def check_float(name: str, tensor: torch.Tensor, *others: torch.Tensor) -> None:
    """A kernel's inputs: one float type, one device, and rows whose elements lie side by side."""
    require(tensor.dtype in DTYPES, f"{name} is {tensor.dtype}: the kernels take bfloat16, float16 or float32")
    require(
        not (triton.knobs.runtime.interpret and tensor.dtype == torch.bfloat16),
        f"{name} is bfloat16, which Triton's interpreter gets wrong: use float16 or float32 there",
    )
    for other in (tensor, *others):
        require(other.dtype == tensor.dtype, f"{name} is {tensor.dtype} but another input is {other.dtype}: cast one")
        require(other.device == tensor.device, f"{name} is on {tensor.device} but another input is on {other.device}")
        require(other.stride(-1) == 1, f"{name}: the last dimension must be contiguous, its stride is not 1")


def check_index(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Integer inputs are int32 (half the bytes of int64), contiguous, on the kernel's device."""
    require(tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    require(tensor.dtype == torch.int32, f"{name} is {tensor.dtype}: pass int32")
    require(tensor.device == device, f"{name} is on {tensor.device}, the queries are on {device}")
    require(tensor.is_contiguous(), f"{name} must be contiguous")


def check_cache(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, num_heads: int, head_size: int) -> None:
    """K and V caches [num_blocks, block_size, Hkv, D] that serve queries of `num_heads` heads of `head_size`."""
    check_float("q", q, k_cache, v_cache)
    require(
        k_cache.ndim == 4 and k_cache.shape == v_cache.shape and k_cache.stride() == v_cache.stride(),
        "k_cache and v_cache must be two [num_blocks, block_size, Hkv, D] tensors of the same shape and strides",
    )
    block_size, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    require(block_size in BLOCK_SIZES, f"block_size {block_size} is not one of {BLOCK_SIZES}")
    require(head_size in HEAD_SIZES, f"head size {head_size} is not one of {HEAD_SIZES}")
    require(k_cache.shape[3] == head_size, f"q has head size {head_size}, the cache {k_cache.shape[3]}")
    require(num_heads % num_kv_heads == 0, f"{num_heads} query heads do not divide among {num_kv_heads} KV heads")


def hopper_obstacle(block_size: int, *tensors: torch.Tensor) -> str | None:
    """What keeps a kernel for Hopper from these tensors, paged ones in blocks of `block_size`; None if nothing does."""
    found = device_class(tensors[0].device)
    starts = [tensor.data_ptr() for tensor in tensors] + [2 * step for t in tensors for step in t.stride()[:-1]]
    obstacles = {
        f"the device is of class {found}, not hopper": found != "hopper",
        "float32 has no fast tensor cores": tensors[0].dtype == torch.float32,
        f"block_size {block_size}: the copy engine swizzles 8 rows": block_size < 8,
        "rows must start at multiples of 16 bytes": any(start % 16 for start in starts),
    }
    return next((obstacle for obstacle, is_there in obstacles.items() if is_there), None)
