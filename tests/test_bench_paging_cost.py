"""What `paging_cost` measures: layouts hold the same keys, kernels give the same attention; times need a GPU."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend

from minivllm.bench import paging_cost as bench
from minivllm.bench.paging_layouts import (
    Keys,
    Paged,
    Run,
    contiguous_runs,
    gather_runs,
    has_engine_kernel,
    paged,
    paged_runs,
    sdpa_runs,
)
from minivllm.course.paging_cost import PagingCost
from minivllm.errors import ConfigError
from tests.kernel_cases import DEVICE, HAS_GPU, TOLERANCE

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
FP32 = torch.float32
SMALL = bench.Settings(contexts=(40,), batches=(3,), heads=(4, 2, 64), dtype=FP32)


@pytest.fixture
def keys() -> Keys:
    """Two copies of three requests of 70 tokens: not a whole number of blocks of 8."""
    return Keys.random(3, 70, 2, (4, 2, 64), DEVICE, FP32, seed=0)


def run(keys: Keys, runs: Sequence[Run], out: torch.Tensor) -> float:
    """All copies, and how far the first requests are from float64."""
    for launch in runs:
        launch()
    return bench.relative_error(out[:2], bench.reference(keys))


@pytest.mark.parametrize("is_scattered", [True, False], ids=["scattered", "in order"])
@pytest.mark.parametrize("block_size", [1, 8, 16, 64, 256])
@pytest.mark.parametrize("kernel", ["plain", "engine", "ragged"])
def test_every_kernel_reads_every_layout(keys: Keys, kernel: str, block_size: int, is_scattered: bool) -> None:
    out = torch.full_like(keys.q, torch.nan)
    layout = paged(keys, block_size, is_scattered, seed=5)
    assert run(keys, paged_runs(keys, layout, kernel, out), out) < TOLERANCE[FP32]
    assert not out.isnan().any()  # each copy wrote its own rows


def test_one_block_for_each_request_is_contiguous_reading_with_the_same_bits(keys: Keys) -> None:
    outs = [torch.full_like(keys.q, torch.nan) for _ in range(2)]
    assert run(keys, contiguous_runs(keys, outs[0]), outs[0]) < TOLERANCE[FP32]
    run(keys, paged_runs(keys, paged(keys, 8, True), "plain", outs[1]), outs[1])
    assert torch.equal(*outs) and bench.bits_of(outs[0]) == bench.bits_of(outs[1])


def test_torchs_attention_agrees_on_contiguous_and_on_gathered_keys(keys: Keys) -> None:
    for runs in (sdpa_runs(keys, SDPBackend.MATH), gather_runs(keys, paged(keys, 16, True), SDPBackend.MATH)):
        answer = runs[0]()
        assert isinstance(answer, torch.Tensor)
        assert bench.relative_error(answer[:2, :, 0], bench.reference(keys)) < TOLERANCE[FP32]


def test_scattered_blocks_lie_in_a_larger_pool_and_out_of_order(keys: Keys) -> None:
    layout, ordered = paged(keys, 8, True), paged(keys, 8, False)
    assert len(layout.k_cache) > len(ordered.k_cache) == 6 * 9
    table = layout.block_table[:, :9]
    assert table.unique().numel() == table.numel() and table[0].diff().unique().numel() > 1
    assert ordered.block_table[:, :9].flatten().tolist() == list(range(54))
    assert isinstance(layout, Paged) and layout.block_table.shape[1] % 16 == 0
    assert layout.k_cache.transpose(1, 2).is_contiguous()  # head by head, as the engine stores them on a GPU


def test_bytes_are_those_of_one_step(keys: Keys) -> None:
    assert keys.num_bytes == 4 * 3 * (2 * 70 * 2 * 64 + 2 * 4 * 64)
    assert [rows.stop - rows.start for rows in keys.steps()] == [3, 3]
    assert not (has_engine_kernel(keys, paged(keys, 8, True)) and DEVICE.type == "cpu")


def test_a_point_gives_the_rows_of_every_layout_and_a_file_that_loads(tmp_path: Path) -> None:
    def clock(runs: object, num_bytes: int) -> tuple[float, float, float]:
        return num_bytes / 1e3, num_bytes / 2e3, num_bytes / 5e2  # 1 GB/s

    rows = [*bench.measure_point(3, 40, SMALL, DEVICE, clock)]
    for row in rows:
        row["share"] = 0.5
        assert row["gbps"] == 1 and float(str(row["error"])) < TOLERANCE[FP32]
        assert str(row["bits"]) in bench.line(row) and str(row["kernel"]) in bench.line(row)
    plain = [row for row in rows if row["kernel"] == "plain"]
    assert len(plain) == 11 and len({row["bits"] for row in plain}) == 1
    assert {row["kernel"] for row in rows} >= {"plain", "ragged"}
    facts = {"gpu": "NVIDIA H200", "commit": "c", "seed": 0, "command": "x"}
    path = tmp_path / "cost.json"
    path.write_text(bench.file_text({"provenance": facts, "roofs": {"before": {"copy_gbps": 2.0}}}, rows))
    cost = PagingCost.load(path)
    assert [row.us for row in cost.rows] == [row["us"] for row in rows] and cost.shape == bench.SHAPE
    assert cost.same_bits() == [(3, 40, 11)]


def test_a_rival_that_cannot_run_is_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    def clock(runs: object, num_bytes: int) -> tuple[float, float, float]:
        raise RuntimeError("not today\nat all")

    assert [*bench.measure_point(3, 40, SMALL, DEVICE, clock)] == []
    assert "plain left out: not today" in capsys.readouterr().err


def test_bits_differ_where_one_bit_does() -> None:
    out = torch.ones(2, 3)
    assert bench.bits_of(out) == bench.bits_of(out.clone()) != bench.bits_of(out.nextafter(out * 2))


@pytest.mark.parametrize(("num_bytes", "copies"), [(10**9, 1), (10**7, 18), (1, 200)])
def test_copies_outgrow_the_cache(num_bytes: int, copies: int) -> None:
    assert bench.copies_of(num_bytes) == copies


@pytest.mark.skipif(HAS_GPU, reason="a machine without a GPU is refused")
def test_without_a_gpu_there_is_one_line_and_no_figure(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="paging_cost needs a CUDA device"):
        bench.main(["--output", str(tmp_path / "cost.json")])
    assert bench.live_figures(bench.Settings()) is None and not (tmp_path / "cost.json").exists()


@pytest.mark.skipif(not HAS_GPU, reason="times need a GPU")
def test_a_gpu_measures_a_point() -> None:
    figures = bench.live_figures(bench.Settings(contexts=(1024,), batches=(8,), block_sizes=(16,)), milliseconds=5)
    assert figures is not None
    cost = PagingCost.of(json.loads(json.dumps(figures)))
    assert cost.row("plain", "scattered", 8, 1024, 16).us > 0
