"""Critics with complex values: the penalty and its gradients are those of torch's double backward, by whichever form."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gankern import penalties

X = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def z(t):
    return torch.complex(t, t * t)


def square(c):
    return torch.view_as_real(c.resolve_conj()).flatten(1).square().sum(1)


def in_place(c, x):
    c.mul_(1j)
    return square(c.add_(x[:, :1]))


# Of (x, a real map of x with weights, the weights) -> a number a sample.
CRITICS = {
    "product": lambda x, y, w: square(z(y) * z(y.sin())),
    "parts": lambda x, y, w: (z(y) * 1j).real.flatten(1).sin().sum(1) + z(y).imag.flatten(1).cos().sum(1),
    "conj": lambda x, y, w: square(z(y).conj() * z(y.sin())),
    "conj_physical": lambda x, y, w: square(z(y).conj_physical() * z(y.sin())),
    "the imaginary part of conj": lambda x, y, w: (-z(y).conj().imag).flatten(1).sin().sum(1),
    "adjoint": lambda x, y, w: square(z(y).mH @ z(x[:, :1])),
    "abs": lambda x, y, w: z(y).abs().flatten(1).sum(1),
    "abs, squared": lambda x, y, w: z(y).abs().flatten(1).square().sum(1),
    "angle": lambda x, y, w: z(y).angle().flatten(1).square().sum(1),
    "sgn": lambda x, y, w: square(z(y).sgn() + z(x[:, :1])),
    "norm": lambda x, y, w: torch.linalg.vector_norm(z(y).flatten(1), dim=1),
    "square root of z conj(z)": lambda x, y, w: (z(y) * z(y).conj()).real.flatten(1).sqrt().sum(1),
    "convolution": lambda x, y, w: square(F.conv2d(z(x), z(w))),
    "matrix product": lambda x, y, w: square(z(x) @ z(y[:, :3])),
    "linear": lambda x, y, w: square(F.linear(z(x).flatten(1), z(w).flatten()[None])),
    "einsum": lambda x, y, w: square(torch.einsum("ncij,ncjk->nik", z(y), z(y).conj())),
    "fft": lambda x, y, w: square(torch.fft.fft2(y)),
    "fft, filtered": lambda x, y, w: square(torch.fft.ifft2(torch.fft.fft2(y) * z(w).mean())),
    "rfft, abs": lambda x, y, w: torch.fft.rfft2(y).abs().flatten(1).sum(1),
    "stft": lambda x, y, w: torch.stft(y.flatten(1), 16, window=X.new_ones(16), return_complex=True)
    .abs().flatten(1).sum(1),
    "polar": lambda x, y, w: square(torch.polar(y, y.sin())),
    "powers": lambda x, y, w: square((z(y) + 2) ** (1.5 + 0.3j) + (z(y) * 1j).exp() + z(y).tanh()),
    "real to a complex power": lambda x, y, w: square((y.square() + 1) ** (1 + 0.5j)),
    "times a complex number": lambda x, y, w: square(y * 1j + y),
    "by a complex number": lambda x, y, w: square(y / (2 + 1j)),
    "add, a complex factor": lambda x, y, w: square(torch.add(z(y), y, alpha=2j)),
    "real and complex": lambda x, y, w: square(x[:, :1] + z(y)) + square(z(y) * x[:, :1]) + square(z(y) / (x[:, 1:2] + 5)),
    "cat of both": lambda x, y, w: square(torch.cat([y, z(y)], 1)),
    "stack": lambda x, y, w: square(torch.stack([z(y), z(y.sin())], 1)),
    "to complex": lambda x, y, w: square(y.to(torch.complex128) * 1j * z(y)),
    "where": lambda x, y, w: square(torch.where(x[:, :1] > 0, z(y), 0j) * z(y)),
    "where, a complex number": lambda x, y, w: square(torch.where(x[:, :1] > 0, y, 2j)),
    "masked_fill": lambda x, y, w: square(z(y).masked_fill(x[:, :1] > 0, 1j) ** 2),
    "index, flip, pad": lambda x, y, w: square(F.pad(z(y)[:, [1, 0, 2]].flip(1), (1, 2)) ** 2),
    "gather": lambda x, y, w: square(z(y).flatten(1).gather(1, x.flatten(1).argsort(1)) ** 2),
    "sums and products": lambda x, y, w: square(z(y).cumsum(1) ** 2) + square(z(y).prod(1)),
    "lerp": lambda x, y, w: square(torch.lerp(z(y), z(y).conj(), 0.3)),
    "in place": lambda x, y, w: in_place(z(y), x),
    "view_as_complex": lambda x, y, w: square(torch.view_as_complex(y.unflatten(3, (-1, 2)).contiguous()) ** 2),
}  # fmt: skip


class Critic(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.convolution, self.function = nn.Conv2d(3, 4, 3, padding=1).double(), function

    def forward(self, x):
        return self.function(x, self.convolution(x), self.convolution.weight)


def by_hand(critic):
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return ((g.flatten(1).norm(dim=1) - 1) ** 2).mean()


@pytest.mark.parametrize("name", CRITICS)
def test_equal_to_torch(name):
    torch.manual_seed(0)
    critic = Critic(CRITICS[name])
    twin = copy.deepcopy(critic)
    ours = penalties.gradient_penalty(critic, X, X, weight=1.0)
    theirs = by_hand(twin)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    ours.backward()
    theirs.backward()
    for ours, theirs in zip(critic.parameters(), twin.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["product", "rfft, abs", "convolution", "real and complex"])
def test_the_tangent_form_itself_does_it(name):
    torch.manual_seed(0)
    critic = Critic(CRITICS[name])
    twin = copy.deepcopy(critic)
    penalties.gradient_penalty(critic, X, X, weight=1.0, method="tangent").backward()
    by_hand(twin).backward()
    for ours, theirs in zip(critic.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("conjugated", [False, True])
def test_complex_weights(conjugated):
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            start = torch.randn(3 * 36, 2, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
            self.weight = nn.Parameter(start.conj() if conjugated else start)

        def forward(self, x):
            return (z(x).flatten(1) @ self.weight).abs().sum(1)

    critic = Complex()
    assert critic.weight.is_conj() == conjugated
    (expected,) = torch.autograd.grad(by_hand(critic), [critic.weight])
    penalties.gradient_penalty(critic, X, X, weight=1.0).backward()
    torch.testing.assert_close(critic.weight.grad, expected, rtol=1e-8, atol=1e-10)
