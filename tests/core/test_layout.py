"""Every question about memory formats has one answer, also where tensors have gaps, one channel or no elements."""

import ast
from itertools import permutations, product
from pathlib import Path

import pytest
import torch
from torch._prims_common import suggest_memory_format

from gankern.core import layout

X = torch.zeros(2, 8, 4, 5)
LAST = X.to(memory_format=torch.channels_last)
VOLUME = torch.zeros(2, 8, 3, 4, 5).to(memory_format=torch.channels_last_3d)
CONTIGUOUS = torch.contiguous_format
TABLE = {  # tensor: memory_format, is_dense_channels_last, has_channels_together, has_whole_pixels
    "contiguous": (X, CONTIGUOUS, False, False, False),
    "channels_last": (LAST, torch.channels_last, True, True, True),
    "channels_last with gaps": (LAST[..., ::2], torch.channels_last, False, True, True),
    "some channels of channels_last": (LAST[:, 2:5], torch.channels_last, False, True, True),
    "every other channel": (LAST[:, ::2], CONTIGUOUS, False, False, False),
    "contiguous with gaps": (X[..., ::2], CONTIGUOUS, False, False, False),
    "rows and columns exchanged": (X.transpose(2, 3), CONTIGUOUS, False, False, False),
    "one channel": (X[:, :1].contiguous(), CONTIGUOUS, False, False, False),
    "one channel of channels_last": (LAST[:, :1], CONTIGUOUS, False, True, False),
    "pixels that overlap": (
        torch.zeros(99).as_strided((2, 8, 4, 5), (40, 1, 9, 2)),
        torch.channels_last,
        False,
        True,
        False,
    ),
    "volume": (VOLUME, torch.channels_last_3d, True, True, None),
    "sequence": (torch.zeros(2, 4, 8).transpose(1, 2), CONTIGUOUS, True, True, None),
    "matrix": (torch.zeros(8, 2).t(), CONTIGUOUS, False, False, None),
}


@pytest.mark.parametrize("name", TABLE)
def test_predicates(name):
    x, memory_format, dense, together, whole = TABLE[name]
    assert layout.memory_format(x) == memory_format
    assert layout.is_dense_channels_last(x) == dense
    assert layout.has_channels_together(x) == together
    assert whole is None or layout.has_whole_pixels(x) == whole
    if x.ndim >= 4:
        like = layout.empty(x, channels=3)
        assert like.shape == (2, 3, *x.shape[2:]) and like.is_contiguous(memory_format=memory_format)


def test_channels_last_is_what_torch_takes_for_it():
    """Of all strides that sizes of 1 and 3 can have in any order of dimensions, and of slices and expansions."""
    for size, order, slices in product(product((1, 3), repeat=4), permutations(range(4)), (1, 2)):
        whole = torch.empty([size[d] for d in order]).permute([order.index(d) for d in range(4)])
        for x in (whole, whole[:, ::slices], whole.expand(3, *size[1:]) if size[0] == 1 else whole):
            assert layout.lies_in_channels_last(x) == (suggest_memory_format(x) is torch.channels_last), x.stride()


def test_accumulation_dtypes():
    sums = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float32}
    for dtype, right in {**sums, torch.float64: torch.float64}.items():
        assert layout.accumulation_dtype(torch.zeros(1, dtype=dtype)) == right


def test_the_questions_are_asked_nowhere_else():
    """No floor reads a stride of the channels by itself: what it means is said in core/layout.py."""
    found = []
    for path in (Path(layout.__file__).parents[1]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())) if path.name != "layout.py" else ():
            strides = isinstance(node, ast.Compare) and ast.unparse(node.left).endswith(".stride(1)")
            if strides or (isinstance(node, ast.FunctionDef) and "channels_last" in node.name):
                found.append(f"{path.name}:{node.lineno}")
    assert found == []
