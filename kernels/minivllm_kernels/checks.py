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


def can_run(device: torch.device) -> bool:
    """Whether a launch on this device runs at all: on a CPU only Triton's interpreter does."""
    return device.type == "cuda" or triton.knobs.runtime.interpret


def check_float(name: str, tensor: torch.Tensor, *others: torch.Tensor) -> None:
    """A kernel's inputs: one float type, one device, and rows whose elements lie side by side."""
    require(tensor.dtype in DTYPES, f"{name} is {tensor.dtype}: the kernels take bfloat16, float16 or float32")
    require(
        can_run(tensor.device),
        f"{name} is on {tensor.device}: move it to a GPU, or set TRITON_INTERPRET=1 before Python starts",
    )
    require(
        not (triton.knobs.runtime.interpret and tensor.dtype == torch.bfloat16),
        f"{name} is bfloat16, which Triton's interpreter gets wrong: use float16 or float32 there",
    )
    for other in (tensor, *others):
        require(other.dtype == tensor.dtype, f"{name} is {tensor.dtype} but another input is {other.dtype}: cast one")
        require(other.device == tensor.device, f"{name} is on {tensor.device} but another input is on {other.device}")
        require(other.stride(-1) == 1, f"{name}: the last dimension must be contiguous, its stride is not 1")


def check_index(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Integer inputs are int32, half the bytes of int64, on the kernel's device; tables may be slices of wider ones."""
    require(tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    require(tensor.dtype == torch.int32, f"{name} is {tensor.dtype}: pass int32")
    require(tensor.device == device, f"{name} is on {tensor.device}, the queries are on {device}")
    is_dense = tensor.numel() == 0 or tensor.stride(-1) == 1
    require(is_dense, f"{name}: the last dimension must be contiguous, its stride is not 1")


def check_options(scale: float | None, window: int | None, soft_cap: float | None) -> None:
    """Numbers that change what attention computes."""
    require(scale is None or scale > 0, f"scale is {scale}: pass a positive number, or None for 1 / sqrt(head size)")
    require(window is None or window >= 1, f"window is {window}: pass at least 1, or None to see all keys")
    require(soft_cap is None or soft_cap > 0, f"soft_cap is {soft_cap}: pass a positive number, or None")


def check_cache(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Queries [rows, H, D] and K and V caches [num_blocks, block_size, Hkv, D] that serve them."""
    require(q.ndim == 3, f"q has shape {tuple(q.shape)}, expected [rows, heads, head size]")
    check_float("q", q, k_cache, v_cache)
    require(
        k_cache.ndim == 4 and k_cache.shape == v_cache.shape and k_cache.stride() == v_cache.stride(),
        "k_cache and v_cache must be two [num_blocks, block_size, Hkv, D] tensors of the same shape and strides",
    )
    _, num_heads, head_size = q.shape
    block_size, num_kv_heads = k_cache.shape[1], k_cache.shape[2]
    require(block_size in BLOCK_SIZES, f"block_size {block_size} is not one of {BLOCK_SIZES}")
    require(head_size in HEAD_SIZES, f"head size {head_size} is not one of {HEAD_SIZES}")
    require(k_cache.shape[3] == head_size, f"q has head size {head_size}, the cache {k_cache.shape[3]}")
    require(num_kv_heads > 0, "the cache has no KV heads")
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
