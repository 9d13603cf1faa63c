"""gnn.PixelNorm is the function; BiasActPixelNorm is in test_bias_act.py beside BiasAct, which it is tested like."""

import torch

import gankern.functional as GF
import gankern.nn as gnn


def test_pixel_norm():
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(gnn.PixelNorm(1e-3, 2)(x), GF.pixel_norm(x, eps=1e-3, dim=2))
    assert not gnn.PixelNorm().state_dict()
