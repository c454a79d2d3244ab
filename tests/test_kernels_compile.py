"""Every kernel as it ships compiles for every class of GPU without a GPU: no spills, and it fits as often as promised.

sm_80, sm_86, sm_90 and sm_100 stand for the four device classes of configs.py; the Gluon kernels are for sm_90 alone.
It needs a process of its own: this one may interpret.
"""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.compile_kernels import Row, broken_bounds, listing
from tests.kernel_handover import overtaken_loads
from tests.wgmma_hazards import overwritten_registers

ROOT = Path(__file__).resolve().parents[1]
FIT = Row("decode", "stream_kernel", 90, num_warps=4, registers=128, shared_bytes=70_000, programs_per_sm=3)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], list[str]]:
    """A row for everything compiled, and the configurations that no example looked up."""
    path = tmp_path_factory.mktemp("compiled") / "rows.json"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "tests" / "compile_kernels.py"), "--json", str(path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert path.exists(), run.stderr[-4000:]
    result = json.loads(path.read_text())
    return [Row(**row) for row in result["rows"]], result["unseen"]


def test_every_kernel_stays_within_its_bounds_on_every_class_of_gpu(compiled: tuple[list[Row], list[str]]) -> None:
    broken = [row for row in compiled[0] if broken_bounds(row)]
    assert not broken, "\n" + listing(broken)


def test_every_configuration_is_compiled(compiled: tuple[list[Row], list[str]]) -> None:
    assert compiled[1] == []


def test_every_kernel_that_a_launcher_starts_is_compiled(compiled: tuple[list[Row], list[str]]) -> None:
    assert set(launched_kernels()) - {row.kernel for row in compiled[0]} == set()


def launched_kernels() -> Iterator[str]:
    """Names of the kernels that appear as kernel[grid](...)."""
    for path in (ROOT / "kernels" / "minivllm_kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Subscript(value=ast.Name(id=name))) if name.endswith("_kernel"):
                    yield name


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"registers": 256, "num_warps": 1}, "256 registers, at most 255"),
        ({"stack_bytes": 8}, "8 bytes of stack (spills), at most 0"),
        ({"shared_bytes": 240_000, "programs_per_sm": 0}, "240000 bytes of shared memory, at most 232448"),
        ({"shared_bytes": 80_000}, "2 programs fit an SM, the configuration counts on 3"),
        ({"registers": 168, "num_warps": 8}, "1 programs fit an SM, the configuration counts on 3"),
        ({"num_hazards": 2}, "2 instructions race: wgmma_hazards.py, kernel_handover.py"),
        ({"error": "OutOfResources"}, "OutOfResources"),
    ],
)
def test_a_broken_bound_is_named(changes: dict[str, Any], complaint: str) -> None:
    assert broken_bounds(FIT) == []
    assert broken_bounds(replace(FIT, **changes)) == [complaint]
    assert complaint in listing([replace(FIT, **changes)])


LOOP = """
.L_x_1:
        {wait}
        /*0100*/   MUFU.EX2 {written}, R40 ;
        /*0120*/   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], !UPT ;
        /*0130*/   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0140*/   HGMMA.64x128x16.F32.BF16 R88, R60, gdesc[UR8], R88 ;
        /*0150*/   @P0 BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize(("written", "num_found"), [("R61", 1), ("R100", 1), ("R59", 0), ("R64", 0)])
def test_a_write_to_a_product_under_way_is_found(written: str, num_found: int) -> None:
    """The product reads R60 .. R63 and fills R88 .. R151; nothing waits for it before the loop begins again."""
    assert len(overwritten_registers(LOOP.format(written=written, wait=""))) == num_found


def test_a_write_after_the_wait_is_no_hazard() -> None:
    wait = "/*00f0*/   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
    assert overwritten_registers(LOOP.format(written="R61", wait=wait)) == []


@pytest.mark.parametrize(("between", "num_found"), [("", 1), ("bar.sync 0, 128;", 0)])
def test_a_store_that_may_overtake_a_load_where_workers_start_is_found(between: str, num_found: int) -> None:
    load, store = "ld.shared.b32 %r236, [global_smem+70656];", "st.shared.v4.b32 [global_smem+70656], {%r9, %r8};"
    lines = ["bar.sync 0, 128;", load, "div.s32 %r946, %r238, %r236;", between, store, "barrier.sync 1;"]
    assert len(overtaken_loads("\n".join(lines))) == num_found
