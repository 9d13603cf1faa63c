"""What holds for the modules of every normalisation with an activation behind it, against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gankern.nn as gnn

BATCH = [
    (gnn.BatchNormAct1d, nn.BatchNorm1d, (6, 4)),
    (gnn.BatchNormAct1d, nn.BatchNorm1d, (6, 4, 5)),
    (gnn.BatchNormAct2d, nn.BatchNorm2d, (6, 4, 5, 3)),
    (gnn.BatchNormAct3d, nn.BatchNorm3d, (6, 4, 2, 5, 3)),
    (gnn.BatchNorm2d, nn.BatchNorm2d, (6, 4, 5, 3)),
]
INSTANCE = [
    (gnn.InstanceNormAct1d, nn.InstanceNorm1d, (6, 4, 5)),
    (gnn.InstanceNormAct2d, nn.InstanceNorm2d, (6, 4, 5, 3)),
    (gnn.InstanceNormAct3d, nn.InstanceNorm3d, (6, 4, 2, 5, 3)),
    (gnn.InstanceNorm2d, nn.InstanceNorm2d, (6, 4, 5, 3)),
]
OPTIONS = [
    {},
    {"momentum": None},
    {"affine": False},
    {"affine": True},
    {"track_running_stats": False},
    {"track_running_stats": True},
    {"affine": True, "track_running_stats": True, "momentum": None},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("ours", "theirs", "shape"), BATCH + INSTANCE)
def test_is_torchs_with_an_activation(ours, theirs, shape, options):
    without_batch = issubclass(theirs, nn.modules.instancenorm._InstanceNorm)  # takes one sample, too
    ours, theirs = ours(4, eps=1e-3, **options), theirs(4, eps=1e-3, **options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())

    def agree(x):
        slope = ours.negative_slope if ours.activation == "leaky_relu" else 1.0
        torch.testing.assert_close(ours(x), F.leaky_relu(theirs(x), slope), rtol=1e-4, atol=1e-5)

    for step in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(step)) + 2
        agree(x)
        if without_batch:
            agree(x[0])
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    ours.eval(), theirs.eval()
    agree(x)
