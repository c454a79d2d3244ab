"""The product of one row with a matrix, against float64."""

import pytest
import torch
from minivllm_kernels.row_product import row_product

from tests.kernel_cases import DEVICE, DTYPES, HAS_GPU, TOLERANCE, relative_error

pytestmark = [pytest.mark.gpu] if HAS_GPU else []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "depth", "has_bias"), [(40, 96, True), (129, 520, False), (7, 1032, True)])
def test_product_is_that_of_float64(dtype: torch.dtype, size: int, depth: int, has_bias: bool) -> None:
    random = torch.Generator().manual_seed(size)
    shapes = ((1, depth), (size, depth), (size,))
    x, weight, bias = (torch.randn(shape, generator=random).to(DEVICE, dtype) for shape in shapes)
    out = torch.full((1, size), float("nan"), dtype=dtype, device=DEVICE)
    row_product(x, weight, bias if has_bias else None, out)
    expected = x.double() @ weight.double().T + (bias.double() if has_bias else 0)
    assert relative_error(out, expected) < TOLERANCE[dtype]


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
