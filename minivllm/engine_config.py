"""How an engine is run: every decision of the scheduler and the KV manager that a user may set, checked when built."""

from bisect import bisect_right
from dataclasses import dataclass, field, replace
from typing import TypedDict

from minivllm.config import require_integers
from minivllm.errors import ConfigError
from minivllm.speculative_config import SpeculativeConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "batching": ("chunked", "decode_first", "prefill_first", "request_level", "static"),
    "scheduling_policy": ("fcfs", "priority", "shortest_first", "longest_prefix_first", "dfs"),
    "preemption_mode": ("recompute", "swap"),
    "allocator": ("paged", "contiguous", "power_of_two", "oracle", "buddy"),
    "prefix_cache": ("hash", "radix"),
    "eviction_policy": ("lru", "lfu", "fifo", "slru", "priority"),
}


WHOLE_PROMPTS = ("decode_first", "prefill_first")  # ways of batching that never cut a prompt


class Policies(TypedDict, total=False):
    """The fields of EngineConfig that LLM takes as keyword arguments under the same names."""

    max_num_seqs: int
    max_num_batched_tokens: int | None
    enable_prefix_caching: bool
    enable_chunked_prefill: bool
    batching: str
    scheduling_policy: str
    aging_steps: int | None
    preemption_mode: str
    num_host_blocks: int
    allocator: str
    prefix_cache: str
    eviction_policy: str
    watermark: float
    speculative_config: object  # a dict, or a list of them; read_speculative


@dataclass(frozen=True)
class EngineConfig:
    """Sizes, and one choice for each policy; the files in engine/ say what each choice does."""

    num_blocks: int  # physical blocks, the null block 0 included
    block_size: int = 16
    max_model_len: int = 2048
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    batching: str = "chunked"
    scheduling_policy: str = "fcfs"
    aging_steps: int | None = None  # steps of waiting that outweigh one unit of priority; None: strict priorities
    preemption_mode: str = "recompute"
    num_host_blocks: int = 0  # blocks in host memory, for preemption by swap
    allocator: str = "paged"
    prefix_cache: str = "hash"
    eviction_policy: str = "lru"
    # One block table for each group of layers, and the sliding window beyond which the group's blocks are freed.
    group_windows: tuple[int | None, ...] = (None,)
    watermark: float = 0.01  # share of the pool that admission leaves free for those already running
    eos_token_ids: tuple[int, ...] = field(default=())
    speculative: tuple[SpeculativeConfig, ...] = ()

    def __post_init__(self) -> None:
        self._check_types()
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if not 1 <= self.block_size <= 256:
            raise ConfigError(f"block_size must be from 1 to 256, not {self.block_size}")
        for name, least in (("max_model_len", 2), ("max_num_seqs", 1), ("max_num_batched_tokens", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not 0 <= self.watermark < 1:
            raise ConfigError(f"watermark must be at least 0 and below 1, not {self.watermark}")
        if self.aging_steps is not None and self.aging_steps < 1:
            raise ConfigError(f"aging_steps must be at least 1 (or None for strict priorities), not {self.aging_steps}")
        if not self.chunks_prompts and self.max_num_batched_tokens < self.max_model_len:
            raise ConfigError(
                f"without chunked prefill a whole prompt must fit in one step: raise max_num_batched_tokens "
                f"({self.max_num_batched_tokens}) to max_model_len ({self.max_model_len}) or lower max_model_len"
            )
        if self.capacity_tokens < self.max_model_len:
            way_out = "raise kv_cache_memory (on a GPU, or gpu_memory_utilization) or "
            way_out += f"lower max_model_len to {self.capacity_tokens}"
            if len(self.group_windows) > 1:
                way_out += f", or lower max_num_batched_tokens ({self.max_num_batched_tokens})"
            raise ConfigError(
                f"the KV pool holds {self.capacity_tokens} tokens, less than one request of max_model_len "
                f"{self.max_model_len}: {way_out}"
            )
        self._check_combinations()

    @property
    def capacity_tokens(self) -> int:
        """The longest request that fits in the pool; block 0 is the null block and holds none."""
        return capacity_tokens(self.num_blocks - 1, self.block_size, self.group_windows, self.max_num_batched_tokens)

    def most_blocks(self, num_tokens: int) -> int:
        """Blocks that a request of so many tokens ever holds at a time."""
        return most_blocks(num_tokens, self.block_size, self.group_windows, self.max_num_batched_tokens)

    def limited(self, max_num_seqs: int, max_num_batched_tokens: int) -> "EngineConfig":
        """The same with lower limits of a step. Raises ConfigError for higher ones: buffers are made for these."""
        if max_num_seqs > self.max_num_seqs or max_num_batched_tokens > self.max_num_batched_tokens:
            raise ConfigError(
                f"this engine was built for at most max_num_seqs={self.max_num_seqs} and max_num_batched_tokens="
                f"{self.max_num_batched_tokens}; build it with more, and lower them then"
            )
        return replace(self, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)

    @property
    def chunks_prompts(self) -> bool:
        """Whether a prompt may be computed over several steps."""
        return self.enable_chunked_prefill and self.batching not in WHOLE_PROMPTS

    @property
    def fills_batches(self) -> bool:
        """Whether guests wait until the whole batch is over."""
        return self.batching in ("request_level", "static")

    def _check_types(self) -> None:
        require_integers(
            max_num_seqs=self.max_num_seqs, max_num_batched_tokens=self.max_num_batched_tokens,
            num_host_blocks=self.num_host_blocks, aging_steps=self.aging_steps,
        )  # fmt: skip
        if self.max_num_seqs is None or self.max_num_batched_tokens is None:
            raise ConfigError("max_num_seqs and max_num_batched_tokens must be integers, not None")
        if not self.group_windows or any(not is_window(window) for window in self.group_windows):
            raise ConfigError(f"group_windows must be windows of at least 1 token or None, not {self.group_windows}")
        if self.num_host_blocks is None or self.num_host_blocks < 0:
            raise ConfigError(f"num_host_blocks must be at least 0, not {self.num_host_blocks}")
        for name in ("enable_prefix_caching", "enable_chunked_prefill"):
            if not isinstance(getattr(self, name), bool):  # the string "no" would count as yes
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if not isinstance(self.watermark, int | float):
            raise ConfigError(f"watermark must be a number, not {self.watermark!r}")

    def _check_combinations(self) -> None:
        """Refuse policies that contradict each other."""
        if self.allocator != "paged" and self.enable_prefix_caching:
            raise ConfigError(
                f"allocator={self.allocator!r} gives each request blocks of its own, nothing can be shared: "
                "set enable_prefix_caching=False, or allocator='paged'"
            )
        if self.preemption_mode == "swap" and self.num_host_blocks < 1:
            raise ConfigError("preemption_mode='swap' needs host memory: give swap_space (GiB) or num_host_blocks")
        keeps_starts = self.prefix_cache == "radix" or self.eviction_policy != "lru"
        has_windows = self.group_windows != (None,)
        if has_windows and self.enable_prefix_caching and keeps_starts:
            raise ConfigError(
                "layers of this model have a sliding window, so the starts of prefixes are freed: "
                "use prefix_cache='hash' with eviction_policy='lru', or enable_prefix_caching=False"
            )
        if self.speculative and self.allocator != "paged":
            raise ConfigError(f"allocator={self.allocator!r} cannot give blocks of drafts back: use allocator='paged'")
        if len(self.group_windows) > 1 and any(config.method != "ngram" for config in self.speculative):
            raise ConfigError("layers of this model form groups with tables of their own: use the method 'ngram'")
        if len(self.group_windows) > 1 and self.allocator != "paged":
            raise ConfigError(f"allocator={self.allocator!r} keeps one table for all layers: use allocator='paged'")
        if len(self.group_windows) > 1 and self.group_windows[0] is not None:
            raise ConfigError(f"the first of several groups must see all tokens, not {self.group_windows[0]}")


def is_window(window: object) -> bool:
    return window is None or (isinstance(window, int) and not isinstance(window, bool) and window >= 1)


def most_blocks(num_tokens: int, block_size: int, group_windows: tuple[int | None, ...], budget: int) -> int:
    """Blocks that a request ever holds at a time, when a step computes at most `budget` of its tokens.

    A group with a window holds, while a chunk is computed, the chunk and the window - 1 tokens before it; they may
    begin and end inside a block. The first group counts in full: a prefix hit brings its whole chain back.
    most_blocks(1000, 16, (None, 32), 8) == 63 + 4.
    """
    whole = -(-num_tokens // block_size)
    spans = [min(budget, num_tokens) + window - 1 for window in group_windows[1:] if window is not None]
    num_full = len(group_windows) - len(spans)
    return num_full * whole + sum(min(whole, (span + block_size - 2) // block_size + 1) for span in spans)


def capacity_tokens(num_blocks: int, block_size: int, group_windows: tuple[int | None, ...], budget: int) -> int:
    """The longest request that `num_blocks` blocks hold."""
    lengths = range(num_blocks * block_size + 1)
    return bisect_right(lengths, num_blocks, key=lambda n: most_blocks(n, block_size, group_windows, budget)) - 1
