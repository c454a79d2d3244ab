"""The sampling kernels against their twins, and the claims they make: who draws with whom changes nothing."""

import math
from dataclasses import replace

import pytest
import torch
from minivllm_kernels import configs
from minivllm_kernels.reference import exponential_twin, kept_twin, philox_twin, sample_twin, sampling_words_twin
from minivllm_kernels.sampling import MAX_TILES, sample
from minivllm_kernels.sampling_filters import find_floors

from tests.kernel_cases import DEVICE, DTYPES, HAS_GPU

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
CONFIG = configs.sampler_config(DEVICE)


def rows(
    num_rows: int,
    temperatures: float | list[float] = 1.0,
    seeds: list[int] | None = None,
    positions: list[int] | None = None,
    filters: dict[str, list[float]] | None = None,
) -> dict[str, torch.Tensor]:
    """What sample() takes per row; filters are top_k, top_p and min_p."""
    values: dict[str, list[float] | list[int]] = {
        "temperatures": temperatures if isinstance(temperatures, list) else [temperatures] * num_rows,
        "seeds": seeds or list(range(num_rows)),
        "positions": positions or [5] * num_rows,
        **(filters or {}),
    }
    types = {"seeds": torch.int64, "positions": torch.int64, "top_k": torch.int32}
    return {
        name: torch.tensor(row, dtype=types.get(name, torch.float32), device=DEVICE) for name, row in values.items()
    }


def draw(
    logits: torch.Tensor,
    temperatures: float | list[float] = 1.0,
    seeds: list[int] | None = None,
    positions: list[int] | None = None,
    config: configs.SamplerConfig = CONFIG,
    filters: dict[str, list[float]] | None = None,
) -> torch.Tensor:
    """Tokens [B] of the kernel, its workspace poisoned."""
    num_rows = len(logits)
    out = torch.full((num_rows,), -7, dtype=torch.int64, device=DEVICE)
    partial = torch.full((num_rows, MAX_TILES), -1, dtype=torch.int64, device=DEVICE)  # two NaN each
    arrivals = torch.zeros(num_rows, dtype=torch.int32, device=DEVICE)
    floors = torch.full((num_rows,), math.nan, device=DEVICE)
    values = rows(num_rows, temperatures, seeds, positions, filters)
    sample(logits.to(DEVICE), out=out, partial=partial, arrivals=arrivals, floors=floors, config=config, **values)
    assert not arrivals.any()
    return out.cpu()


def twin(
    logits: torch.Tensor,
    temperatures: float | list[float] = 1.0,
    seeds: list[int] | None = None,
    positions: list[int] | None = None,
    filters: dict[str, list[float]] | None = None,
) -> torch.Tensor:
    """Tokens [B] of the twin, from the arguments of draw()."""
    values = rows(len(logits), temperatures, seeds, positions, filters)
    return sample_twin(logits, **{name: value.cpu() for name, value in values.items()})


def floors_of(logits: torch.Tensor, temperatures: list[float], filters: dict[str, list[float]]) -> torch.Tensor:
    """Floors [B] of the filter kernel."""
    floors = torch.full((len(logits),), math.nan, device=DEVICE)
    values = rows(len(logits), temperatures, filters=filters)
    find_floors(
        logits.to(DEVICE), values["temperatures"], floors, top_k=values.get("top_k"), top_p=values.get("top_p"),
        min_p=values.get("min_p"), config=CONFIG,
    )  # fmt: skip
    return floors.cpu()


def normal(num_rows: int, vocab: int, dtype: torch.dtype = torch.float32, scale: float = 2.0) -> torch.Tensor:
    return (torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(vocab)) * scale).to(dtype)


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square in standard deviations above its mean: beyond 4 with probability 2e-4 at 15 degrees of freedom."""
    freedom = len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


# ------------------------------------------------------------------ noise


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ],
)
def test_philox_gives_the_words_that_its_authors_publish(counter: list[int], key: list[int], words: list[int]) -> None:
    assert [
        int(word) for word in philox_twin([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    ] == words


def words_of(seeds: torch.Tensor, positions: torch.Tensor, num_items: int, kind: int) -> torch.Tensor:
    """Random bits of items 0, 1, ... of each row, [B, num_items]."""
    return sampling_words_twin(seeds, positions, torch.arange(num_items).expand(len(seeds), num_items), kind)


def test_small_exponentials_are_as_many_as_they_should_be() -> None:
    noise = exponential_twin(words_of(torch.arange(64), torch.full((64,), 9), 2**14, 0)).flatten()
    assert abs(float(noise.mean()) - 1) < 4 / math.sqrt(len(noise))
    for limit in (1e-5, 1e-4, 1e-2, 1.0, 5.0):
        expected = len(noise) * -math.expm1(-limit)
        assert abs(int((noise < limit).sum()) - expected) < 4 * math.sqrt(expected)


@pytest.mark.parametrize("neighbour", ["seed", "position", "item", "kind"])
def test_neighbours_have_unrelated_noise(neighbour: str) -> None:
    seeds, positions = torch.arange(65), torch.full((65,), 3)
    if neighbour == "position":
        seeds, positions = positions, seeds
    one = words_of(seeds, positions, 4096, 0)
    other = words_of(seeds, positions, 4096, 1) if neighbour == "kind" else one
    rows, items = {"seed": (1, 0), "position": (1, 0), "item": (0, 1), "kind": (0, 0)}[neighbour]
    pairs = (one[rows:, items:] / 2**32 - 0.5) * (other[: 65 - rows, : 4096 - items] / 2**32 - 0.5) * 12
    assert abs(float(pairs.mean())) < 4 / math.sqrt(pairs.numel())


# ------------------------------------------------------------------ the draw


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 255, 1024, 2500, 5003])
def test_draws_equal_the_twins(dtype: torch.dtype, vocab: int) -> None:
    logits = normal(6, vocab, dtype)
    temperatures, positions = [1.0, 0.6, 0.0, 2.0, 1e-4, 0.3], [0, 1, 2**31 + 5, 2**40, 4, 5]
    seeds = [0, -1, 2**63 - 1, -(2**63), 17, 2**32]
    assert torch.equal(draw(logits, temperatures, seeds, positions), twin(logits, temperatures, seeds, positions))


def test_tokens_are_drawn_as_often_as_the_softmax_says() -> None:
    logits, draws = normal(1, 16), 512 if HAS_GPU else 64
    many = torch.cat([twin(logits.expand(4096, 16), 0.8), draw(logits.expand(draws, 16), 0.8)])
    assert torch.equal(many[:draws], many[4096:])  # the kernel draws what the twin draws, so count the twin's
    assert chi_square(many[:4096].bincount(minlength=16), torch.softmax(logits[0].double() / 0.8, -1) * 4096) < 4


def test_tiles_win_as_often_as_their_mass_says() -> None:
    logits = normal(1, 5000, scale=1.0)
    logits[0, 1024:2048], logits[0, 2048:3072] = -math.inf, logits[0, :1024]  # an empty tile, two of one mass
    logits[0, 3500] = 6.0  # as much as 250 others
    draws = 4096
    tokens = twin(logits.expand(draws, 5000), 0.9)
    share = torch.softmax(logits[0].double() / 0.9, -1) * draws
    bins = torch.arange(5000) // 512  # the halves of each tile
    expected = torch.zeros(10, dtype=torch.float64).index_add_(0, bins, share)
    is_filled = expected > 0
    counts = bins[tokens].bincount(minlength=10)
    assert int(counts[~is_filled].sum()) == 0 and chi_square(counts[is_filled], expected[is_filled]) < 4
    assert abs(int((tokens == 3500).sum()) - share[3500]) < 4 * math.sqrt(share[3500])
    assert torch.equal(draw(logits.expand(24, 5000), 0.9), tokens[:24])


def test_only_differences_of_logits_count() -> None:
    logits = (normal(4, 2500) * 64).round() / 64  # so that no sum below rounds
    assert torch.equal(draw(logits + 4096, 0.7), draw(logits, 0.7))


@pytest.mark.parametrize("changing", ["seeds", "positions"])
def test_neighbouring_rows_draw_independently(changing: str) -> None:
    logits = torch.zeros(4097, 4)
    tokens = twin(logits, 1.0, *((None, None) if changing == "seeds" else ([3] * 4097, list(range(4097)))))
    pairs = (tokens[:-1] * 4 + tokens[1:]).bincount(minlength=16)
    assert chi_square(pairs, torch.full((16,), 4096 / 16)) < 4


def test_a_row_draws_the_same_alone_and_in_a_batch() -> None:
    logits = normal(5, 3000)
    together = draw(logits, 0.9, seeds=[9, 8, 7, 6, 5], positions=[1, 2, 3, 4, 5])
    assert [int(draw(logits[r : r + 1], 0.9, [9 - r], [1 + r])) for r in (1, 4)] == together[[1, 4]].tolist()


@pytest.mark.parametrize(("tiles", "programs_per_sm", "stages"), [(1, 1, 1), (1, 3, 2), (2, 1, 3), (4, 1, 1)])
def test_tiles_and_splits_change_nothing(tiles: int, programs_per_sm: int, stages: int) -> None:
    logits = normal(3, 9001)
    other = replace(CONFIG, tiles=tiles, num_warps=4, programs_per_sm=programs_per_sm, stages=stages)
    assert torch.equal(draw(logits, [0.7, 0.0, 1.5], config=other), draw(logits, [0.7, 0.0, 1.5]))


@pytest.mark.parametrize("programs_per_sm", [1, 3])
def test_greedy_takes_the_lowest_of_equal_tokens(programs_per_sm: int) -> None:
    logits = torch.full((4, 4200), -1.0)
    logits[0, [300, 1030, 4100]] = 2.5
    logits[1, [1, 0]] = torch.tensor([0.0, -0.0])  # equal, whatever their signs
    logits[2] = torch.arange(4200).flip(0) / 7
    logits[3, 1023] = math.inf
    tokens = draw(logits, 0.0, config=replace(CONFIG, tiles=1, programs_per_sm=programs_per_sm))
    assert tokens.tolist() == [300, 0, 0, 1023]


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((4, 2049), -math.inf)
    logits[0, 2048] = -50.0
    logits[1, [5, 1500]] = 1.0
    logits[3, 7] = math.inf
    tokens = draw(logits, 1.0)
    assert tokens[0] == 2048 and int(tokens[1]) in (5, 1500) and tokens[3] == 7
    assert tokens[2] == 0  # nothing to draw from: in range, as torch.argmax


@pytest.mark.skipif(not HAS_GPU, reason="numpy's maximum keeps NaN, a GPU's drops it")
def test_nan_never_wins() -> None:
    logits = normal(2, 3000)
    logits[:, ::2] = math.nan
    assert (draw(logits, [1.0, 0.0]) % 2 == 1).all()


def test_a_high_temperature_is_uniform_and_a_low_one_greedy() -> None:
    logits = normal(4, 2000)
    assert torch.equal(draw(logits, 1e-6), logits.argmax(dim=-1))
    assert torch.equal(draw(logits, 1e6), draw(torch.zeros_like(logits), 1.0))


def test_rows_may_be_strided_and_the_output_narrow() -> None:
    wide = normal(3, 2 * 1200)
    wide[:, :1200] = math.inf  # whoever reads past a row draws this
    out = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    partial = torch.zeros(3, MAX_TILES, dtype=torch.int64, device=DEVICE)
    arrivals = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    values = rows(3)
    sample(wide.to(DEVICE)[:, 1200:], values["temperatures"], values["seeds"], values["positions"].int(), out, partial,
           arrivals)  # fmt: skip
    assert torch.equal(out.long().cpu(), twin(wide[:, 1200:]))


# ------------------------------------------------------------------ filters


FILTERS: list[dict[str, list[float]]] = [
    {"top_k": [1, 5, 0, 3000]},
    {"top_p": [0.9, 0.3, 1.0, 1e-6]},
    {"min_p": [0.1, 1.0, 0.0, 0.02]},
    {"top_k": [40, 0, 3, 0], "top_p": [0.5, 0.8, 0.99, 1.0], "min_p": [0.0, 0.01, 0.3, 0.5]},
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("filters", FILTERS, ids=lambda filters: "+".join(filters))
def test_floors_keep_what_the_twin_keeps(dtype: torch.dtype, filters: dict[str, list[float]]) -> None:
    logits, temperatures = normal(4, 1500, dtype), [1.0, 0.7, 1.3, 0.5]
    floors = floors_of(logits, temperatures, filters)
    limits = {"top_k": [0] * 4, "top_p": [1.0] * 4, "min_p": [0.0] * 4, **filters}
    for row, (top_k, top_p, min_p) in enumerate(zip(*limits.values(), strict=True)):
        kept = kept_twin(logits[row], temperatures[row], int(top_k), top_p, min_p)
        assert torch.equal(logits[row].float() > floors[row], kept), (top_k, top_p, min_p)


def test_filtered_draws_equal_the_twins_and_spare_rows_without_filters() -> None:
    logits, temperatures = normal(5, 1300), [1.0, 0.8, 1.2, 1.0, 0.0]
    filters: dict[str, list[float]] = {"top_k": [1, 30, 0, 0, 2], "top_p": [1.0, 0.6, 0.7, 1.0, 0.1]}
    tokens = draw(logits, temperatures, filters=filters)
    assert torch.equal(tokens, twin(logits, temperatures, filters=filters))
    assert tokens[0] == logits[0].argmax() and tokens[3] == draw(logits, temperatures)[3]


def test_ties_at_a_limit_stay_together() -> None:
    logits = torch.zeros(3, 600)
    logits[:, 7], logits[:, 100:140] = 2.0, 1.0
    floors = floors_of(logits, [1.0] * 3, {"top_k": [2, 41, 0], "top_p": [1.0, 1.0, 0.1]})
    assert (logits > floors[:, None]).sum(dim=1).tolist() == [41, 41, 41]


def test_the_best_tokens_may_share_a_group() -> None:
    group = CONFIG.filter_tile  # tokens that far apart meet in one register of the first read
    logits = normal(3, 4 * group + 77, scale=1.0)
    logits[:, 5::group] = torch.tensor([9.0, 7.5, 8.0, 8.5, 7.0])
    logits[1, 6::group] = torch.tensor([7.25, 8.75, 7.75, 8.25, 7.0])
    temperatures = [1.0, 0.5, 0.9]
    floors = floors_of(logits, temperatures, {"top_k": [4, 9, 0], "top_p": [1.0, 1.0, 0.6]})
    for row, (top_k, top_p) in enumerate([(4, 1.0), (9, 1.0), (0, 0.6)]):
        assert torch.equal(logits[row] > floors[row], kept_twin(logits[row], temperatures[row], top_k, top_p, 0.0))


def test_masked_and_lowest_finite_logits_do_not_disturb_a_filter() -> None:
    logits = normal(2, 900)
    logits[0, 100:800], logits[1, 50:] = -math.inf, torch.finfo(torch.float32).min
    filters: dict[str, list[float]] = {"top_k": [20, 30], "top_p": [0.8, 0.9]}
    assert torch.equal(draw(logits, 1.0, filters=filters), twin(logits, 1.0, filters=filters))


# ------------------------------------------------------------------ the door


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperatures": torch.ones(3)}, "temperatures has shape"),
        ({"seeds": torch.ones(2, dtype=torch.int32)}, "seeds is torch.int32"),
        ({"partial": torch.ones(2, 4, dtype=torch.int64)}, "partial has shape"),
        ({"logits": torch.ones(2, 8, dtype=torch.float64)}, "logits is torch.float64"),
        ({"top_k": torch.ones(2, dtype=torch.int32)}, "filters need floors"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, torch.Tensor], message: str) -> None:
    right = {"logits": torch.ones(2, 8), "temperatures": torch.ones(2), "seeds": torch.ones(2, dtype=torch.int64),
             "positions": torch.ones(2, dtype=torch.int64), "out": torch.ones(2, dtype=torch.int64),
             "partial": torch.ones(2, MAX_TILES, dtype=torch.int64),
             "arrivals": torch.zeros(2, dtype=torch.int32)}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        sample(config=CONFIG, **{name: tensor.to(DEVICE) for name, tensor in {**right, **change}.items()})


@pytest.mark.parametrize("filters", [{"top_p": [0.9]}, {"min_p": [0.001]}, {"min_p": [1.0]}, {"top_k": [3]}], ids=str)
def test_a_logit_of_exactly_zero_is_kept_like_any_other(filters: dict[str, list[float]]) -> None:
    """Zero as the smallest and as the largest logit: below it comes no -0, which it would not exceed."""
    for row in ([-math.inf] * 4 + [0.0] * 4, [3.0, 2.0, 1.0, 0.0], [0.0, -1.0, -2.0, -8.0]):
        logits = torch.tensor([row] * 64)
        every = {name: values * 64 for name, values in filters.items()}
        twin = sample_twin(logits, **{k: v.cpu() for k, v in rows(64, 5.0, list(range(64)), None, every).items()})
        assert torch.equal(draw(logits, 5.0, list(range(64)), filters=every), twin)
