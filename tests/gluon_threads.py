"""Run a Gluon kernel's own code without a GPU: each group of warps is a thread, and barriers truly block.

Triton's interpreter knows no Gluon. Here `gl`, `mbarrier`, `tma` and the tensor cores are a few lines of torch: shared
memory is a flat array in the order that the swizzled layout gives it (without the swizzle), copies land late and in
random order, products read their operands only when somebody waits for them. A kernel that frees a tile too early gets
wrong numbers, one that waits for what never comes gets "deadlock".
"""

import itertools
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.runtime.jit import JITFunction

LAYOUT = SimpleNamespace(parent=None)


class Values(torch.Tensor):
    """A tensor of registers: as in Gluon its type has a layout, here an empty one."""

    type: Any = SimpleNamespace(layout=LAYOUT)


def values(data: Any) -> Values:
    return torch.as_tensor(data).as_subclass(Values)


@dataclass
class Barrier:
    """Counts arrivals and bytes; a phase is over when both are used up."""

    count: int = 0
    missing: int = 0
    bytes_to_land: int = 0
    phases_over: int = 0

    def change(self, arrivals: int, landing_bytes: int) -> None:
        self.missing -= arrivals
        self.bytes_to_land += landing_bytes
        assert self.missing >= 0, "more arrivals than the barrier counts"
        if self.missing == 0 and self.bytes_to_land == 0:
            self.phases_over, self.missing = self.phases_over + 1, self.count


@dataclass(frozen=True)
class Shared:
    """A view of shared memory; a matrix wider than 64 columns lies as column halves, each with all its rows."""

    flat: torch.Tensor
    shape: list[int]
    is_transposed: bool = False
    layout: Any = None

    @property
    def dtype(self) -> torch.dtype:
        return self.flat.dtype

    def index(self, place: Any) -> "Shared":
        size = self.flat.numel() // self.shape[0]
        assert 0 <= place < self.shape[0]
        return Shared(self.flat[int(place) * size : (int(place) + 1) * size], self.shape[1:])

    def permute(self, order: tuple[int, int]) -> "Shared":
        assert order == (1, 0)
        return replace(self, is_transposed=True)

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> "Shared":
        assert torch.Size(shape).numel() == self.flat.numel()
        return Shared(self.flat, shape)

    def matrix(self) -> torch.Tensor:
        rows, columns = self.shape
        matrix = self.flat.view(columns // 64, rows, 64).transpose(0, 1).reshape(rows, columns).float()
        return matrix.T if self.is_transposed else matrix

    def load(self, layout: Any) -> Values:
        assert self.shape[1] == 64
        return values(self.flat.view(self.shape).clone())

    def store(self, data: torch.Tensor) -> None:
        rows, columns = self.shape
        matrix = data.T if self.is_transposed else data
        self.flat.copy_(matrix.reshape(rows, columns // 64, 64).transpose(0, 1).flatten())


@dataclass(frozen=True)
class Pointer:
    """Into a tensor's storage, in elements."""

    tensor: torch.Tensor
    offset: Any = 0

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.tensor.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.tensor, self.offset + offset)

    def flat(self) -> torch.Tensor:
        start = self.tensor.storage_offset()
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size() - start
        return self.tensor.as_strided((size,), (1,), start)


@dataclass
class Product:
    """A matrix product under way."""

    compute: Callable[[], torch.Tensor]
    result: Any = None


@dataclass
class Program:
    """One thread block: what its threads share."""

    number: int
    num_programs: int
    luck: random.Random
    changed: threading.Condition = field(default_factory=threading.Condition)
    copies: list[Callable[[], None]] = field(default_factory=list)
    num_running: int = 1
    num_waiting: int = 0
    has_failed: bool = False
    mine: threading.local = field(default_factory=threading.local)

    def wait(self, barrier: Barrier, phase: Any, pred: Any = True) -> None:
        """Until the phase of this parity is over; whoever waits does the copy engine's work meanwhile."""
        with self.changed:
            while pred and barrier.phases_over % 2 == int(phase):
                if self.copies:
                    self.copies.pop(self.luck.randrange(len(self.copies)))()
                    self.wake()
                    continue
                self.num_waiting += 1
                self.has_failed |= self.num_waiting == self.num_running
                if self.has_failed:
                    self.wake()
                    raise RuntimeError("deadlock: every thread waits and no copy is under way")
                self.changed.wait()

    def wake(self) -> None:
        """Something changed: all look again."""
        self.num_waiting = 0
        self.changed.notify_all()

    def change(self, barrier: Barrier, arrivals: int, landing_bytes: int) -> None:
        with self.changed:
            barrier.change(arrivals, landing_bytes)
            self.wake()

    def arrive(self, barrier: Barrier, count: int = 1, pred: Any = True) -> None:
        if pred:
            self.change(barrier, count, 0)

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.missing = count

    def expect(self, barrier: Barrier, num_bytes: int, pred: Any = True) -> None:
        if pred:
            self.change(barrier, 1, num_bytes)

    def copy(self, box: Any, corner: Sequence[Any], barrier: Barrier, part: Shared, pred: Any = True) -> None:
        """Ask the copy engine for a box; what lies outside the tensor lands as zero."""
        if not pred:
            return
        source, starts = box.base, [int(start) for start in corner]
        assert list(box.block_shape[-2:]) == part.shape and part.flat.numel() == torch.Size(box.block_shape).numel()

        def land() -> None:
            part.flat.zero_()
            inside = [slice(at, at + size) for at, size in zip(starts, box.block_shape, strict=True)]
            found = source[tuple(inside)]
            part.flat.view(box.block_shape)[tuple(slice(0, size) for size in found.shape)] = found
            barrier.change(0, -part.flat.numel() * part.flat.element_size())

        with self.changed:
            self.copies.append(land)
            self.wake()

    def multiply(self, a: Any, b: Shared, sums: Any, use_acc: bool = True, is_async: bool = False) -> Any:
        def compute() -> torch.Tensor:
            left = a.matrix() if isinstance(a, Shared) else a.float()
            before = sums.result if isinstance(sums, Product) else sums  # products end in the order they began
            return values(left @ b.matrix() + (before if use_acc else 0.0))

        product = Product(compute)
        self.under_way().append(product)
        return product if is_async else self.wait_products(0, (product,))

    def under_way(self) -> list[Product]:
        return self.mine.__dict__.setdefault("products", [])

    def wait_products(self, num_outstanding: int, deps: tuple[Product, ...]) -> Any:
        while len(self.under_way()) > num_outstanding:
            product = self.under_way().pop(0)
            product.result = product.compute()
        results = tuple(product.result for product in deps)
        assert all(result is not None for result in results), "a product is used before it was waited for"
        return results[0] if len(results) == 1 else results

    def specialize(self, parts: Sequence[tuple[Callable[..., None], tuple[Any, ...]]], *_: Any) -> None:
        """Each part in a thread of its own; the first error of any is raised."""
        errors: list[BaseException] = []

        def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            try:
                function(*arguments)
                assert not self.under_way(), "a product was left under way"
            except BaseException as error:
                errors.append(error)
                self.has_failed = True
            with self.changed:
                self.num_running -= 1
                self.wake()

        threads = [threading.Thread(target=run, args=part) for part in parts]
        self.num_running = len(threads)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        assert not self.copies, "a copy was asked for that nobody waits for"

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
        if dtype == torch.int64:
            barriers = [Barrier() for _ in range(shape[0])]
            return SimpleNamespace(shape=shape, index=lambda place: barriers[place])
        return Shared(torch.full((torch.Size(shape).numel(),), float("nan"), dtype=dtype), shape)

    def names(self) -> dict[str, Any]:
        """What a kernel's source means by its imported names."""
        language = {
            "constexpr": gl.constexpr, "float32": torch.float32, "int32": torch.int32,
            "int64": torch.int64, "static_range": range,
            "program_id": lambda axis: self.number, "num_programs": lambda axis: self.num_programs,
            "arange": lambda start, end, layout: values(torch.arange(start, end)),
            "zeros": lambda shape, dtype, layout: values(torch.zeros(shape)),
            "full": lambda shape, value, dtype, layout: values(torch.full(shape, value)),
            "minimum": lambda a, b: values(torch.minimum(values(a), values(b))),
            "maximum": lambda a, b: values(torch.maximum(values(a), values(b))),
            "where": lambda condition, a, b: values(torch.where(values(condition), a, b)),
            "max": torch.amax, "sum": torch.sum, "exp2": torch.exp2, "log2": torch.log2,
            "associative_scan": lambda tensor, axis, _add: tensor.cumsum(axis),
            "convert_layout": lambda tensor, layout: tensor,
            "load": load, "store": store, "atomic_add": atomic_add,
            "allocate_shared_memory": self.allocate, "warp_specialize": self.specialize,
            **{name: lambda *_: LAYOUT for name in dir(gl) if name.endswith("Layout")},
        }  # fmt: skip
        barriers = SimpleNamespace(
            MBarrierLayout=lambda: LAYOUT, init=self.init, wait=self.wait, arrive=self.arrive,
            expect=self.expect,
        )  # fmt: skip
        return {
            "gl": SimpleNamespace(**language), "tl": SimpleNamespace(debug_barrier=lambda: None),
            "mbarrier": barriers, "fence_async_shared": lambda: None,
            "tma": SimpleNamespace(async_copy_global_to_shared=self.copy), "warpgroup_mma": self.multiply,
            "warpgroup_mma_wait": self.wait_products,
        }  # fmt: skip


def load(pointer: Pointer, mask: Any = True, other: float = 0, cache_modifier: str = "") -> Values:
    offsets, kept = torch.broadcast_tensors(torch.as_tensor(pointer.offset), torch.as_tensor(mask))
    loaded = torch.full(offsets.shape, other, dtype=pointer.tensor.dtype)
    loaded[kept] = pointer.flat()[offsets[kept]]
    return values(loaded)


def store(pointer: Pointer, data: Any, mask: Any = True) -> None:
    tensors = (torch.as_tensor(value) for value in (pointer.offset, data, mask))
    offsets, stored, kept = torch.broadcast_tensors(*tensors)
    pointer.flat()[offsets[kept]] = stored[kept].to(pointer.tensor.dtype)


def atomic_add(pointer: Pointer, value: int, sem: str) -> Values:
    """Programs run one after another, and of a program one thread adds."""
    before = load(pointer)
    store(pointer, before + value)
    return before


@dataclass(frozen=True)
class ThreadedKernel:
    """Launches like the kernel it stands for: kernel[(num_programs,)](...)."""

    kernel: Any
    modules: tuple[ModuleType, ...]  # that hold it and its helpers
    seed: int = 0

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, maxnreg: int, **constants: Any) -> None:
            for number in range(grid[0]):
                program = Program(number, grid[0], random.Random(self.seed + number))
                self.rebuilt(program)(*map(argument, arguments), **constants)

        return launch

    def rebuilt(self, program: Program) -> Callable[..., None]:
        """The kernel with its helpers as plain Python, its imports replaced by this program's."""
        names: dict[str, Any] = {}
        for name, value in itertools.chain.from_iterable(vars(module).items() for module in self.modules):
            names[name] = value.value if isinstance(value, gl.constexpr) else value
        names |= program.names()
        for name, value in list(names.items()):
            if isinstance(value, JITFunction):
                names[name] = FunctionType(value.fn.__code__, names, name)
        return FunctionType(self.kernel.fn.__code__, names)


def argument(value: Any) -> Any:
    """As the kernel sees it: a tensor is a pointer, a descriptor has its tensor's type."""
    if hasattr(value, "block_shape"):
        return SimpleNamespace(base=value.base, block_shape=value.block_shape, dtype=value.base.dtype)
    return Pointer(value) if isinstance(value, torch.Tensor) else value
