"""Which tile sizes the attention kernels run with: static tables by device class, chosen by measurement (NOTES.md)."""

from dataclasses import dataclass

import torch
from triton import next_power_of_2

from minivllm_kernels.configs import device_class

MOST_PROGRAMS_PER_SM = 16  # that share one line of tiles, resident or waiting: workspaces are sized by it


@dataclass(frozen=True)
class DecodeConfig:
    """How `paged_decode` runs: enough bytes in flight (32 kB a multiprocessor) to keep the memory busy."""

    tile_bytes: int  # of K, and as many of V: 16 kB are 64 tokens of head size 128 in bf16
    num_warps: int
    num_stages: int
    programs_per_sm: int
    least_tiles: int = 4  # the shortest stretch worth a program: shorter ones cost more to merge than they save

    def tile_tokens(self, row_bytes: int) -> int:
        """Keys per tile; a tensor core wants at least 16."""
        return max(16, min(128, self.tile_bytes // row_bytes))


DECODE = {
    "hopper": DecodeConfig(tile_bytes=16384, num_warps=4, num_stages=3, programs_per_sm=2),
    "blackwell": DecodeConfig(tile_bytes=16384, num_warps=4, num_stages=3, programs_per_sm=2),
    "ampere": DecodeConfig(tile_bytes=16384, num_warps=4, num_stages=2, programs_per_sm=2),
    "consumer": DecodeConfig(tile_bytes=8192, num_warps=4, num_stages=2, programs_per_sm=2),
    "interpreter": DecodeConfig(tile_bytes=8192, num_warps=4, num_stages=1, programs_per_sm=1, least_tiles=1),
}


def decode_config(device: torch.device) -> DecodeConfig:
    """The measured choice for this device."""
    return DECODE[device_class(device)]


@dataclass(frozen=True)
class HopperDecodeConfig:
    """How `paged_decode_hopper` runs: a program's shared memory is a ring of tiles, of K and of V in turn.

    Where all shares start at once, rings of more than 64 to 96 kB an SM are slower: what is asked for beyond the
    memory's speed only waits in line, and SMs with a short way to it get ahead of the others (NOTES.md).
    """

    tile_bytes: int  # of K or of V, one entry of the ring: a multiple of 64 tokens
    num_stages: int  # entries of the ring
    programs_per_sm: int
    box_tokens: int = 32  # that one copy fetches: large boxes are fewer copies, small ones end nearer to the last token
    least_tiles: int = 4  # the shortest stretch worth a program: shorter ones cost more to merge than they save
    waves: int = 1  # shares for each program that fits: the hardware hands the later ones to whoever is free

    @property
    def shares_per_sm(self) -> int:
        return self.programs_per_sm * self.waves

    def tile_tokens(self, head_size: int, block_size: int) -> int:
        """Keys of a tile of 16-bit floats; of 8 blocks at most, for the fetching warp holds their ids in registers."""
        return min(self.tile_bytes // (2 * head_size), 8 * block_size)

    @property
    def registers(self) -> int:
        """Of each of a program's 256 threads at launch."""
        return min(128, 65_536 // (256 * self.programs_per_sm) // 8 * 8)


HOPPER_DECODE_HEAD_SIZES = (64, 128)
HOPPER_DECODE = {
    "wide group": HopperDecodeConfig(tile_bytes=16384, num_stages=2, programs_per_sm=2),  # registers for all its heads
    "many pairs": HopperDecodeConfig(tile_bytes=32768, num_stages=3, programs_per_sm=2, waves=8),  # hardly one is cut
    "few pairs": HopperDecodeConfig(tile_bytes=32768, num_stages=3, programs_per_sm=1, least_tiles=2),  # fewest parts
    "narrow heads": HopperDecodeConfig(tile_bytes=16384, num_stages=2, programs_per_sm=3),  # few pairs of head size 64
}


def hopper_decode_config(group: int, head_size: int, pairs_per_sm: float) -> HopperDecodeConfig:
    """By the query heads of a KV head, and by the (request, KV head) pairs that each multiprocessor gets."""
    if group > 8:
        return HOPPER_DECODE["wide group"]
    if pairs_per_sm >= 16:
        return HOPPER_DECODE["many pairs"]
    return HOPPER_DECODE["narrow heads" if head_size == 64 else "few pairs"]


@dataclass(frozen=True)
class PrefixConfig:
    """How `shared_prefix_decode` runs: tiles of `rows` queries against the prefix, `own` for a request's own keys."""

    rows: int
    tile_bytes: int
    num_warps: int
    num_stages: int
    own: DecodeConfig
    stream: HopperDecodeConfig | None = None  # for own keys by equal shares instead, where paged_decode_hopper fits
    own_split_tokens: int = 1024  # more where more than most_own_parts would be needed
    most_own_parts: int = 4
    most_splits: int = 8

    def own_parts(self, max_own_tokens: int) -> tuple[int, int]:
        """How many tokens a part of own keys has, and how many parts there are."""
        split_tokens = max(self.own_split_tokens, next_power_of_2(-(-max_own_tokens // self.most_own_parts)))
        return split_tokens, -(-max_own_tokens // split_tokens)

    def num_splits(self, num_tiles: int, num_sms: int) -> int:
        """Parts of the prefix: enough programs for every multiprocessor, few enough parts to merge."""
        return max(1, min(self.most_splits, num_sms // num_tiles))

    def reading(self, row_bytes: int) -> dict[str, int]:
        """What differs from the own keys' constants."""
        tile = max(16, min(128, self.tile_bytes // row_bytes))
        return {"ROWS": self.rows, "TILE": tile, "num_warps": self.num_warps, "num_stages": self.num_stages}


PREFIX = {
    "hopper": PrefixConfig(
        rows=64, tile_bytes=16384, num_warps=4, num_stages=3, own=DECODE["hopper"],
        stream=HopperDecodeConfig(tile_bytes=16384, num_stages=5, programs_per_sm=1),  # beside a prefix program
    ),
    "blackwell": PrefixConfig(rows=64, tile_bytes=16384, num_warps=4, num_stages=3, own=DECODE["blackwell"]),
    "ampere": PrefixConfig(rows=64, tile_bytes=16384, num_warps=4, num_stages=2, own=DECODE["ampere"]),
    "consumer": PrefixConfig(rows=64, tile_bytes=8192, num_warps=4, num_stages=2, own=DECODE["consumer"]),
    "interpreter": PrefixConfig(
        rows=16, tile_bytes=8192, num_warps=4, num_stages=1, own=DECODE["interpreter"], own_split_tokens=128
    ),
}  # fmt: skip


def prefix_config(device: torch.device) -> PrefixConfig:
    """The measured choice for this device."""
    return PREFIX[device_class(device)]


@dataclass(frozen=True)
class MlaConfig:
    """How `mla_decode` runs: two tiles of 64 tokens (74 kB in bf16) and 16 queries (18 kB) fill a multiprocessor."""

    heads: int  # query heads of one program: each block of heads reads the cache again
    tile: int  # tokens
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1
    least_tiles: int = 4  # the shortest stretch worth a program: a part is as wide as 28 tokens of 16 heads


# By heads of one program. At 16 the tensor cores idle and only bytes count; at 64 (WGMMA) they are what counts.
MLA = {
    "hopper": {
        16: MlaConfig(heads=16, tile=64, num_warps=8, num_stages=3),
        32: MlaConfig(heads=32, tile=64, num_warps=8, num_stages=3),
        64: MlaConfig(heads=64, tile=64, num_warps=8, num_stages=2),
    },
    "blackwell": {
        16: MlaConfig(heads=16, tile=64, num_warps=8, num_stages=3),
        32: MlaConfig(heads=32, tile=64, num_warps=8, num_stages=3),
    },
    "ampere": {
        16: MlaConfig(heads=16, tile=32, num_warps=4, num_stages=4),
        32: MlaConfig(heads=32, tile=32, num_warps=8, num_stages=4),
    },
    "consumer": {16: MlaConfig(heads=16, tile=16, num_warps=4, num_stages=4)},
    "interpreter": {16: MlaConfig(heads=16, tile=32, num_warps=4, num_stages=1, least_tiles=1)},
}
MLA_FLOAT32 = MlaConfig(heads=16, tile=16, num_warps=4, num_stages=2)  # 37 kB of queries, 37 kB a tile: fits anywhere


def mla_config(device: torch.device, num_heads: int, dtype: torch.dtype) -> MlaConfig:
    """The measured choice: 20 heads take the entry of 32 heads, 128 that of the most there is."""
    if dtype == torch.float32 and device.type == "cuda":
        return MLA_FLOAT32
    choices = MLA[device_class(device)]
    return choices[min(max(choices), max(16, next_power_of_2(num_heads)))]


@dataclass(frozen=True)
class MlaHopperConfig:
    """How `mla_decode_hopper` runs: packs of 8 kB boxes beside 1152 bytes of queries a head fill a multiprocessor."""

    heads: int  # query heads of a group of four warps
    groups: int
    pack: int  # boxes that share a barrier, of a tile's 9
    places: int  # packs of the ring
    least_tiles: int = 4

    @property
    def registers(self) -> int:
        """Of a thread at launch; the fetching warps then hand most of theirs to the groups."""
        return 152 if self.groups == 1 else 168


MLA_HOPPER = {  # by heads of one program
    16: MlaHopperConfig(heads=16, groups=1, pack=3, places=6),
    32: MlaHopperConfig(heads=32, groups=1, pack=3, places=7),
}


def mla_hopper_config(num_heads: int) -> MlaHopperConfig:
    """20 heads take the entry of 32 heads, and so do 128: four programs read what one fetched into the L2 cache."""
    return MLA_HOPPER[next((heads for heads in MLA_HOPPER if heads >= num_heads), max(MLA_HOPPER))]


@dataclass(frozen=True)
class HopperAttentionConfig:
    """How `paged_attention_hopper` runs: 2 * head size * (128 + 2 * num_stages * tile) bytes of shared memory."""

    tile: int  # keys
    num_stages: int  # tiles of K, and of V, under way or in use
    is_persistent: bool = True  # a program per multiprocessor takes items in turn, else each item is a program
    overlaps: bool = True  # softmax of a tile runs beside the output of the tile before
    takes_turns: bool = False  # the two groups issue their products strictly in turn


HOPPER_ATTENTION = {  # by head size
    64: HopperAttentionConfig(tile=128, num_stages=4, takes_turns=True),
    128: HopperAttentionConfig(tile=128, num_stages=3, takes_turns=True),
    256: HopperAttentionConfig(tile=64, num_stages=2),
}


@dataclass(frozen=True)
class AttentionConfig:
    """How `paged_attention` runs: two programs an SM where registers allow."""

    rows: int  # (token, query head) pairs of a tile
    tile_bytes: int  # of K, and as many of V: 16 kB are 64 tokens of head size 128 in bf16
    num_warps: int
    num_stages: int
    most_tokens: int = 128  # of a tile: narrow heads would take more
    q_bytes: int = 65536  # of queries: wide heads take fewer rows
    registers: int | None = None  # a thread at most
    heads_first: bool = False  # neighbouring programs take the heads of one tile, or else the tiles of one head
    box: "AttentionConfig | None" = None  # instead, where a tensor descriptor can fetch the tiles

    def tile_rows(self, row_bytes: int, group: int) -> int:
        """Rows of a tile, at least one token's heads."""
        return max(min(self.rows, self.q_bytes // row_bytes), next_power_of_2(group))

    def tile_tokens(self, row_bytes: int) -> int:
        """Keys of a tile, at least the 16 a tensor core wants."""
        return max(16, min(self.most_tokens, self.tile_bytes // row_bytes))

    @property
    def compile_options(self) -> dict[str, int | None]:
        """What the compiler is told beside the tile sizes."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.registers}


# By the most rows a request can have: decodes and a few drafts; many drafts or a short prompt; prompts.
ATTENTION_BY_MMA = {
    16: AttentionConfig(rows=16, tile_bytes=8192, num_warps=4, num_stages=4),
    64: AttentionConfig(rows=64, tile_bytes=8192, num_warps=4, num_stages=3, q_bytes=16384),
    128: AttentionConfig(rows=128, tile_bytes=8192, num_warps=8, num_stages=3, q_bytes=32768),
}
ATTENTION = {
    "hopper": {
        16: AttentionConfig(rows=16, tile_bytes=16384, num_warps=4, num_stages=3),
        64: AttentionConfig(
            rows=64, tile_bytes=16384, num_warps=4, num_stages=2,
            box=AttentionConfig(rows=64, tile_bytes=16384, num_warps=4, num_stages=2),
        ),
        128: AttentionConfig(
            rows=128, tile_bytes=32768, num_warps=8, num_stages=3, q_bytes=32768,
            box=AttentionConfig(
                rows=128, tile_bytes=16384, num_warps=4, num_stages=2, most_tokens=64, q_bytes=32768
            ),
        ),
    },
    "blackwell": {
        16: AttentionConfig(rows=16, tile_bytes=16384, num_warps=4, num_stages=3),
        64: AttentionConfig(rows=64, tile_bytes=16384, num_warps=4, num_stages=2),
        128: AttentionConfig(
            rows=128, tile_bytes=16384, num_warps=8, num_stages=2,
            box=AttentionConfig(rows=128, tile_bytes=32768, num_warps=8, num_stages=2),
        ),
    },
    "ampere": ATTENTION_BY_MMA,
    "consumer": ATTENTION_BY_MMA,
    "interpreter": {
        16: AttentionConfig(rows=16, tile_bytes=8192, num_warps=4, num_stages=1),
        64: AttentionConfig(
            rows=64, tile_bytes=16384, num_warps=4, num_stages=1,
            box=AttentionConfig(rows=64, tile_bytes=16384, num_warps=4, num_stages=1),
        ),
    },
}  # fmt: skip
ATTENTION_FLOAT32 = AttentionConfig(rows=16, tile_bytes=8192, num_warps=8, num_stages=1)  # exact: no tensor cores, slow


def attention_config(device: torch.device, dtype: torch.dtype, num_rows: int) -> AttentionConfig:
    """The measured choice for requests of at most `num_rows` (token, query head) pairs."""
    if dtype == torch.float32 and device.type == "cuda":
        return ATTENTION_FLOAT32
    choices = ATTENTION[device_class(device)]
    return choices[next((rows for rows in choices if rows >= num_rows), max(choices))]
