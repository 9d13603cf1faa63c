"""Every compiled operator, each of its tensor arguments apart in every dtype, in other strides and of other sizes: what
is not refused is what contiguous arguments of one dtype give."""

import importlib.util
from pathlib import Path

import pytest
import torch

import gankern
from gankern.core.native import NATIVE_MISSING

spec = importlib.util.spec_from_file_location("gankern_operators", Path(__file__).with_name("operators.py"))
operators = importlib.util.module_from_spec(spec)
spec.loader.exec_module(operators)

pytestmark = pytest.mark.skipif(NATIVE_MISSING is not None, reason=str(NATIVE_MISSING))


@pytest.mark.parametrize("dtype", operators.DTYPES, ids=str)
def test_every_argument_in_every_form(dtype):
    counts, wrong = operators.check([], (dtype,))
    assert not wrong, "\n".join(wrong[:40])
    compiled = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
        if name.startswith("gankern::")
    }
    assert set(counts) == compiled
    assert min(counts.values()) > 10


def test_a_wrong_kernel_is_seen(monkeypatch):
    """The check itself: an operator that misreads strides is told apart from one that does not."""
    right = operators.run

    def wrong(operator, args):
        return right(operator, [a.as_strided(a.shape, a.contiguous().stride()) if isinstance(a, torch.Tensor) else a for a in args])  # fmt: skip

    monkeypatch.setattr(operators, "run", wrong)
    _, found = operators.check(["pixel_norm"], (torch.float32,))
    assert any("wrong numbers" in line for line in found)


@pytest.mark.parametrize("dtype", operators.DTYPES, ids=str)
@pytest.mark.parametrize("dialect", gankern.functional.SPECTRAL_NORM_DIALECTS)
def test_spectral_norm_of_a_channels_last_weight(dialect, dtype):
    """Whatever dtypes and strides u and v have: every buffer apart, twice the same, and as the contiguous weight."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((64, 3, 4, 4), (5, 7, 3, 3), (4, 3, 2, 3, 2)):
        weight = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        u, v = torch.randn(shape[0], generator=generator), torch.randn(weight[0].numel(), generator=generator)
        last = torch.channels_last if weight.ndim == 4 else torch.channels_last_3d
        for of_u in operators.DTYPES:
            for of_v in operators.DTYPES:
                results = []
                for w, wide in (
                    (weight, False),
                    (weight.to(memory_format=last), False),
                    (weight.to(memory_format=last), True),
                ):
                    us, vs = u.to(of_u, copy=True), v.to(of_v, copy=True)
                    if wide:
                        us, vs = operators.gaps(us), operators.gaps(vs)
                    y = gankern.functional.spectral_norm(w, us, vs, dialect=dialect, implementation="cpu")
                    results.append((y, us, vs))
                # Up to another order of summation, and to the buffers' own dtypes.
                coarse = 8 * max(*(torch.finfo(d).eps for d in (dtype, of_u, of_v)), 1e-6)
                for result in results[1:]:
                    for ours, right in zip(result, results[0]):
                        torch.testing.assert_close(ours, right, rtol=coarse, atol=coarse)
