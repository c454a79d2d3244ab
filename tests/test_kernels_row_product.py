"""The products of one row, with norm before them and addition after them, against float64."""

import pytest
import torch
from minivllm_kernels.reference import rms_norm_twin, silu_and_mul_twin
from minivllm_kernels.row_gate import row_gate
from minivllm_kernels.row_product import row_product

from tests.kernel_cases import DEVICE, DTYPES, HAS_GPU, TOLERANCE, relative_error

pytestmark = [pytest.mark.gpu] if HAS_GPU else []
EPS = 1e-3  # large: leaving it out must show
SIZES = [(40, 96, True), (129, 520, False), (7, 1032, True), (6, 3080, False)]


def tensors(size: int, depth: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, weight, bias, another row to add to x, a norm's weight, a row to add to the product."""
    random = torch.Generator().manual_seed(size)
    shapes = ((1, depth), (size, depth), (size,), (1, depth), (depth,), (1, size))
    made = (torch.randn(shape, generator=random) for shape in shapes)
    return tuple(tensor.to(DEVICE, dtype) for tensor in made)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "depth", "has_bias"), SIZES)
@pytest.mark.parametrize("early", [False, True])
def test_product_is_that_of_float64(dtype: torch.dtype, size: int, depth: int, has_bias: bool, early: bool) -> None:
    x, weight, bias, *_ = tensors(size, depth, dtype)
    out = torch.full((1, size), float("nan"), dtype=dtype, device=DEVICE)
    row_product(x, weight, bias if has_bias else None, out, early=early)
    expected = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    assert relative_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "depth", "has_bias"), SIZES)
def test_what_comes_before_and_after_the_product_is_that_of_float64(
    dtype: torch.dtype, size: int, depth: int, has_bias: bool
) -> None:
    x, weight, bias, plus, norm, residual = tensors(size, depth, dtype)
    chosen, wide = (bias, bias.double()) if has_bias else (None, 0)
    for addend in (None, plus):
        row = x if addend is None else x + addend
        expected = rms_norm_twin(row, norm, EPS) @ weight.double().T + wide + residual.double()
        out = residual.clone()
        row_product(x, weight, chosen, out, plus=addend, norm=norm, eps=EPS, add_to=out)
        assert relative_error(out, expected) < TOLERANCE[dtype]
        other = torch.full_like(residual, float("nan"))
        row_product(x, weight, chosen, other, plus=addend, norm=norm, eps=EPS, add_to=residual)
        assert torch.equal(other, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "depth", "has_bias"), SIZES)
def test_gate_is_that_of_float64(dtype: torch.dtype, size: int, depth: int, has_bias: bool) -> None:
    x, weight, bias, _, norm, _ = tensors(2 * size, depth, dtype)
    weight /= depth**0.5
    out = torch.full((1, size), float("nan"), dtype=dtype, device=DEVICE)
    row_gate(x, norm, weight, bias if has_bias else None, out, eps=EPS)
    expected = silu_and_mul_twin(rms_norm_twin(x, norm, EPS) @ weight.double().T + (bias.double() if has_bias else 0))
    assert relative_error(out, expected) < 2 * TOLERANCE[dtype]  # two products, multiplied


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, weight, out = (torch.zeros(shape, device=DEVICE) for shape in ((1, 8), (16, 8), (1, 16)))
    with pytest.raises(ValueError, match=r"x must be \[1, K\]"):
        row_product(torch.cat((x, x)), weight, None, out)
    with pytest.raises(ValueError, match="weight has 8"):
        row_product(x[:, :6], weight, None, out)
    with pytest.raises(ValueError, match="out has shape"):
        row_product(x, weight, None, out[:, :8])
    with pytest.raises(ValueError, match="bias must be"):
        row_product(x, weight, x[0], out)
    with pytest.raises(ValueError, match="norm must be"):
        row_product(x, weight, None, out, norm=out[0])
    with pytest.raises(ValueError, match="plus must be"):
        row_product(x, weight, None, out, plus=out)
    with pytest.raises(ValueError, match="add_to has shape"):
        row_product(x, weight, None, out, add_to=x)
    with pytest.raises(ValueError, match="out has shape"):
        row_gate(x, x[0], weight, None, out, eps=EPS)
