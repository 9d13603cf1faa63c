"""Buffers that a forward updates are all looked at before the first one is written: an error leaves them as they were."""

import pytest
import torch

import gankern.functional as GF


def inference(x):
    with torch.inference_mode():
        return x.clone()


WAYS = {  # how a buffer cannot be updated, and what the error says
    "expanded": (lambda x: x[:1].expand_as(x), "is an expanded view"),
    "inference": (inference, "was made in inference mode"),
    "gradient": (lambda x: x.clone().requires_grad_(), "requires a gradient"),
}


@pytest.mark.parametrize("implementation", ["cpu", "reference", None])
@pytest.mark.parametrize("way", WAYS)
def test_batch_norm(way, implementation):
    make, says = WAYS[way]
    x, mean = torch.randn(4, 3, 5, 5), torch.zeros(3)
    with pytest.raises(ValueError, match=f"batch_norm_act: running_var is updated in place, and {says}"):
        GF.batch_norm_act(x, mean, make(torch.ones(3)), training=True, implementation=implementation)
    assert not mean.any()
    with torch.no_grad():  # in which it reads alone; of a gradient: tests/ops/test_batch_norm_act.py
        GF.batch_norm_act(x, mean, make(torch.ones(3)), training=False, implementation=implementation)


@pytest.mark.parametrize("implementation", ["cpu", "reference", None])
@pytest.mark.parametrize("way", WAYS)
def test_spectral_norm(way, implementation):
    make, says = WAYS[way]
    w, u, v = torch.randn(4, 6), torch.randn(4), torch.randn(6)
    before = u.clone()
    with pytest.raises(ValueError, match=f"spectral_norm: v is updated in place, and {says}"):
        GF.spectral_norm(w, u, make(v), implementation=implementation)
    assert torch.equal(u, before)
    GF.spectral_norm(w, u, make(v), training=False, implementation=implementation)


def test_lists_and_sigmas():
    w, u, v = torch.randn(4, 6), torch.randn(4), torch.randn(6)
    before = u.clone(), v.clone()
    with pytest.raises(ValueError, match="1 sigmas for 2 weights"):
        GF.spectral_norm_group([w, w], [u, u.clone()], [v, v.clone()], sigmas=[None])
    with pytest.raises(ValueError, match=r"sigma has shape \(3,\)"):
        GF.spectral_norm(w, u, v, sigma=torch.zeros(3))
    with pytest.raises(TypeError, match="sigma is int64"):
        GF.spectral_norm(w, u, v, sigma=torch.zeros((), dtype=torch.int64))
    assert torch.equal(u, before[0]) and torch.equal(v, before[1])


def test_within_inference_mode_buffers_of_inference_are_updated():
    with torch.inference_mode():
        w, u, v = torch.randn(4, 6), torch.randn(4), torch.randn(6)
        before = u.clone()
        GF.spectral_norm(w, u, v)
        assert not torch.equal(u, before)
