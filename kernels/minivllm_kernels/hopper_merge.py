"""Merging the parts of a (request, KV head) that was cut: split_kv.merge_partials once more, for a Gluon kernel."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def merge_parts(
    workspace, first_part, num_parts, out_row, lse_row, stride_out_head,
    GROUP: gl.constexpr, COLS: gl.constexpr, MERGE_ROWS: gl.constexpr, PARTS: gl.constexpr,
):  # fmt: skip
    """Store the merged output of a pair's parts, PARTS read at a time: their latencies overlap."""
    parts_ptr, lse_ptr, _ = workspace
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // COLS, COLS // 4], [4, 1], [1, 0])
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    rows = gl.arange(0, MERGE_ROWS, layout=row_layout)
    columns = gl.arange(0, COLS, layout=gl.SliceLayout(0, layout))[None, :]
    peak = gl.full([MERGE_ROWS], float("-inf"), gl.float32, row_layout)
    total = gl.zeros([MERGE_ROWS], gl.float32, row_layout)
    output = gl.zeros([MERGE_ROWS, COLS], gl.float32, layout)
    for start in range(0, num_parts, PARTS):
        lses, outputs = (), ()
        for i in gl.static_range(PARTS):
            part = start + i
            slot = first_part + gl.where(part == 0, 0, gl.num_programs(0) + part)
            is_there = (rows < GROUP) & (part < num_parts)
            part_rows = slot * GROUP + rows
            pointers = parts_ptr + part_rows[:, None] * COLS + columns
            lses += (gl.load(lse_ptr + part_rows, mask=is_there, other=float("-inf"), cache_modifier=".cg"),)  # type: ignore[assignment]
            outputs += (gl.load(pointers, mask=is_there[:, None], other=0.0, cache_modifier=".cg"),)  # type: ignore[assignment]
        for i in gl.static_range(PARTS):
            new_peak = gl.maximum(peak, lses[i])
            pivot = gl.where(new_peak == float("-inf"), 0.0, new_peak)  # padding rows: -inf less -inf is NaN
            shrink, weight = gl.exp2(peak - pivot), gl.exp2(lses[i] - pivot)
            total = total * shrink + weight
            output = output * shrink[:, None] + outputs[i] * weight[:, None]
            peak = new_peak
    output /= gl.where(total == 0, 1.0, total)[:, None]
    pointers = out_row + rows[:, None] * stride_out_head + columns
    gl.store(pointers, output.to(out_row.dtype.element_ty), mask=(rows < GROUP)[:, None])
    if lse_row is not None:
        gl.store(lse_row + rows * stride_out_head // COLS, peak + gl.log2(total), mask=rows < GROUP)
