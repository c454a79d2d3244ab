"""`minivllm bench kernels`: cases run what they name, count ideal work and are judged by targets; times need a GPU."""

import argparse
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from minivllm_kernels.mla_decode import mla_decode
from minivllm_kernels.paged_attention import paged_attention
from minivllm_kernels.paged_decode import paged_decode
from torch.nn.attention import SDPBackend

from minivllm.bench import kernels as bench
from minivllm.bench.kernel_inputs import AttentionShape, attention_inputs
from minivllm.bench.kernel_read import build_read, read_cases
from minivllm.bench.kernel_rivals import sdpa
from minivllm.bench.kernel_rows import fused_case, gate_case, norm_case, row_cases, sample_case
from minivllm.bench.kernel_shapes import (
    Case,
    MlaShape,
    Target,
    attention_cases,
    decode_case,
    mla_case,
    prefill_case,
    prefix_case,
)
from minivllm.bench.kernel_timing import Roofs, copies_needed, spread
from minivllm.bench.table import kernel_table
from minivllm.errors import ConfigError
from minivllm.provenance import provenance
from tests.kernel_cases import TOLERANCE

SMALL = {
    "read": Case("read", "read", partial(build_read, 1), 1, Target()),
    "decode": decode_case("decode", [40, 1, 97], (4, 2), 64, Target(), paged_decode),
    "prefix": prefix_case(3, 64, 70, (4, 2), Target()),
    "prefill": prefill_case("prefill", 2, 20, 50, 16, Target(), paged_attention),
    "mla": mla_case(MlaShape(2, 70, 4, 32, 16), False, Target(), mla_decode),
    "qk-norm + RoPE + store": fused_case(5, 4, 2, 64, Target()),
    "add + RMSNorm": norm_case(5, 64),
    "SiLU * up": gate_case(5, 64),
    "sample": sample_case(3, 200, None, Target()),
    "sample, top-p": sample_case(3, 200, 0.9, Target()),
}
ROOFS = Roofs(copy_gbps=4000.0, gemm_tflops=700.0)
RESULT = bench.Result("decode", "a", 100.0, 99.0, 101.0, 3500.0, "GB/s", 0.875, 0.002, "", {})


@pytest.mark.parametrize("name", SMALL)
def test_a_small_case_of_every_kind_agrees_with_its_twin(name: str) -> None:
    call = SMALL[name].build(torch.device("cpu"), torch.float32, 0)
    call.run()
    assert call.check() < TOLERANCE[torch.float32]


def test_the_check_sees_an_output_that_was_never_written() -> None:
    call = SMALL["decode"].build(torch.device("cpu"), torch.float32, 0)
    assert not call.check() < 1


@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_sdpa_computes_what_our_kernel_computes(name: str) -> None:
    new, total = {"decode": (1, 50), "prefill": (20, 50)}[name]
    step = attention_inputs(AttentionShape(((new, total),) * 2, 4, 2, 64), torch.device("cpu"), torch.float32, 0)
    step.out.copy_(sdpa(SDPBackend.MATH, step)().reshape(step.q.shape))
    assert step.error() < TOLERANCE[torch.float32]


def test_blocks_lie_scattered_over_a_pool_larger_than_used_and_prefixes_are_shared() -> None:
    step = attention_inputs(AttentionShape(((1, 200),) * 4, 4, 2, 64), torch.device("cpu"), torch.float32, 0, 128)
    assert len(step.k_cache) > 4 * 4
    assert step.block_table[0].diff().unique().numel() > 1
    assert all(step.block_table[row, :2].equal(step.block_table[0, :2]) for row in range(4))
    assert step.block_table[:, 2:].unique().numel() == 4 * 2


def test_ideal_bytes_and_flops_of_attention() -> None:
    decode = AttentionShape(((1, 4096),) * 64, 32, 8, 128)
    assert decode.num_bytes == 64 * (4096 * 8 + 32) * 128 * 4 + 4 * 64 * 64  # K, V, q, out; one int32 a block
    causal = AttentionShape(((3, 5),), 2, 1, 64)
    assert causal.flops == 4 * 2 * 64 * (3 + 4 + 5)  # its queries see 3, 4 and 5 keys


def test_a_shared_prefix_counts_once() -> None:
    case = prefix_case(256, 2048, 128, (16, 8), Target())
    assert case.num_bytes == (2048 + 256 * 128) * 8 * 128 * 4 + 256 * 16 * 128 * 4 + 4 * 256 * 2


def test_every_part_of_the_target_table_is_there_and_no_name_twice() -> None:
    cases = [*read_cases(), *attention_cases(), *row_cases()]
    assert {case.part for case in cases} == set(bench.PARTS)
    assert len({case.name for case in cases}) == len(cases)
    named = {case.target.twin[0] for case in cases if case.target.twin}
    assert named <= {case.name for case in cases}


def test_ragged_lengths_differ_and_their_twin_has_as_many_bytes() -> None:
    cases = {case.name: case for case in attention_cases()}
    ragged = next(case for name, case in cases.items() if "ragged" in name)
    assert ragged.target.twin is not None
    equal = cases[ragged.target.twin[0]]
    lengths = {total for _, total in ragged.build.args[0].requests}  # type: ignore[attr-defined]
    assert min(lengths) < 200 and max(lengths) > 1900 and len(lengths) > 200
    assert abs(ragged.num_bytes / equal.num_bytes - 1) < 0.05


def test_speed_counts_the_resource_that_binds() -> None:
    by_bytes = replace(SMALL["decode"], num_bytes=350_000_000, flops=0)
    assert bench.rates(by_bytes, 100.0, ROOFS) == (3500.0, 0.875)
    assert bench.rates(replace(by_bytes, flops=35_000_000_000), 100.0, ROOFS) == (350.0, 0.5)


@pytest.mark.parametrize(
    ("target", "verdict"),
    [
        (Target(), None),
        (Target(at_most_us=100), True),
        (Target(at_most_us=99), False),
        (Target(least_tflops=3501), False),
        (Target(least_share=0.87), True),
        (Target(at_most_us=100, least_share=0.9), False),
        (Target(twin=("equal", 1.05)), True),
        (Target(twin=("equal", 1.01)), False),
        (Target(twin=("not measured", 1.05)), None),
    ],
)
def test_a_target_is_met_only_if_all_of_it_is(target: Target, verdict: bool | None) -> None:
    assert bench.is_met(target, RESULT, [replace(RESULT, what="equal", us=98.0)]) is verdict


def test_small_launches_rotate_over_more_than_the_l2_cache() -> None:
    assert copies_needed(2_000_000) == 91
    assert copies_needed(100_000_000) == 20
    assert copies_needed(1000) == 200


def test_roofs_that_moved_are_seen() -> None:
    assert spread(ROOFS, replace(ROOFS, gemm_tflops=665.0)) == pytest.approx(0.05)


def test_without_a_gpu_there_is_one_line() -> None:
    with pytest.raises(ConfigError, match="bench kernels needs a CUDA device"):
        bench.main([])


def test_an_unknown_choice_gets_one_line() -> None:
    with pytest.raises(ConfigError, match="--only: no case holds 'nonsense'"):
        bench.chosen("nonsense")
    assert {case.part for case in bench.chosen("prefix,64 x 4096")} == {"prefix", "decode"}


def test_the_result_file_says_where_it_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met = replace(RESULT, target="<= 260 us", is_met=True, rivals_us={"FA3": 110.0, "SDPA cuDNN": 120.0})
    roofs = {"before": {"copy_gbps": 4000.0, "gemm_tflops": 700.0}, "after": {}, "trusted": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "measure", lambda args: ([met], roofs))
    monkeypatch.setattr(bench, "gpu_facts", lambda: {"gpu": "H200", "triton": "3.6.0"})
    path = tmp_path / "kernels.json"
    assert bench.main(["--json", str(path)]) == 0
    facts = json.loads(path.read_text())["provenance"]
    assert all(facts[name] for name in ("gpu", "triton", "torch", "commit", "command"))
    table = kernel_table(path)
    assert "| a | 100.0 | 3500.0 GB/s | 0.875 | <= 260 us | yes | FA3 110.0 |" in table
    assert "H200" in table and "4000 GB/s" in table


@pytest.mark.gpu
def test_a_quick_run_measures_and_judges_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    args = argparse.Namespace(only="256 tokens, width 1024", quick=True, seed=0)
    results, roofs = bench.measure(args)
    assert all(result.us > 0 and result.error < TOLERANCE[torch.bfloat16] for result in results)
    assert roofs["before"]


def test_a_copy_without_git_takes_its_commit_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("MINIVLLM_COMMIT", "abc123")
    assert provenance(0)["commit"] == "abc123"
