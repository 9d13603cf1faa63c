"""The sums of what other kernels' programs left."""

import pytest
import torch

from gankern.triton.launch import recorded
from gankern.triton.sums import FEW, LARGE, MANY, TOGETHER, VALUES, sum_of_parts

# Parts [outer, channels, inner], and how many channels of how many parts a program has at a time.
SHAPES = [
    ((5, 7, 3), (TOGETHER, VALUES // TOGETHER)),
    ((MANY - 1, 33, 1), (TOGETHER, VALUES // TOGETHER)),
    ((43, 9, 3), (FEW, VALUES // FEW)),
    ((LARGE // FEW + 9, 17, 1), (FEW, LARGE // FEW)),
    ((2, 3, TOGETHER + 1), (1, VALUES)),
    ((3, 2, LARGE // 2 - 1), (1, LARGE)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "tile"), SHAPES, ids=str)
def test_sums_of_parts(shape, tile, dtype, device):
    parts = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device, dtype)
    with recorded() as launches:
        sum_of_parts(parts, dtype)
    assert (launches[0].constants["CHANNELS"], launches[0].constants["PARTS"]) == tile
    right, exact = parts.sum((0, 2)), parts.double().sum((0, 2))
    error, allowed = ((y.double() - exact).abs().max() for y in (sum_of_parts(parts, dtype), right))
    units = 8 if dtype == torch.float64 else 1  # what is exact is of that type, too
    assert error <= 2 * allowed + units * torch.finfo(dtype).eps * (shape[0] * shape[2]) ** 0.5 * exact.abs().max()
