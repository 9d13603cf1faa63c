"""What the GPU's tests share."""

import pytest
import torch


def _bits(x: torch.Tensor) -> torch.Tensor:
    # Bytes are seen only of what is contiguous and has a dimension.
    return x.detach().flatten().contiguous().view(torch.uint8)


@pytest.fixture
def same_bits():
    """A function: whether two lists of tensors hold the same bits, NaN and the signs of zeros included, whatever their
    strides are."""

    def check(ours, theirs):
        assert len(ours) == len(theirs)
        for x, y in zip(ours, theirs):
            assert x.shape == y.shape and x.dtype == y.dtype
            assert torch.equal(_bits(x), _bits(y))

    return check
