"""Path length regularisation: a penalty on the generator, of how far an image moves when its latent does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from gankern.core.arguments import real as real_number
from gankern.core.arguments import shown
from gankern.functional import _checks
from gankern.penalties._common import (
    _by_double_backward,
    _hand_out_to,
    check_callable,
    check_conditions,
    check_generator,
    check_surroundings,
    samples_of,
)

Generator = Callable[..., Tensor]


def path_length(
    generator: Generator,
    latents: Tensor,
    *,
    target: float | Tensor | None = None,
    weight: float = 2.0,
    noise: Tensor | None = None,
    random: torch.Generator | None = None,
    generator_args: Sequence[Any] = (),
    generator_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    r"""Path length regularisation: a step of one length in the latent space shall change every image by as much.

    :math:`\lambda\,\mathrm{mean}_n(\ell_n - a)^2` with :math:`\ell_n = \lVert J_n^T y_n\rVert_2`, :math:`J_n` the
    Jacobian of the generator at latent n, and y an image of N(0, 1) divided by the square root of its number of pixels.
    :math:`J^T y = \nabla_w \langle G(w), y\rangle`, so one data gradient gives it, and its own gradient, by the
    generator's parameters, is of second order.

    Source: Karras et al. 2020, arXiv 1912.04958, section 3.2 and appendix B; y and the weight of 2 as in its authors'
    code.

    Args:
        generator: called as ``generator(latents, *generator_args, **generator_kwargs)``; returns [N, C, ...] or [N, D].
        latents: [N, D], or [N, L, D] for a generator with a latent for each of L layers: squared lengths are then means
            over the layers. Latents that require a gradient (of a mapping network, say) get one.
        target: a, 0 or more. None is the mean of these lengths; :class:`PathLength` keeps the moving average of the
            paper. Always a constant: no gradient flows through it.
        weight: λ.
        noise: y times the square root of the number of pixels, of the images' shape; drawn from ``random`` otherwise.

    Returns:
        A scalar in fp32 (fp64 for fp64). Its backward gives the generator its gradients, which are computed here, and
        it cannot be differentiated twice: as for :func:`gradient_penalty`.

    Raises:
        ValueError, TypeError: naming the argument, what came and what is accepted.
        RuntimeError: inside torch.no_grad(), torch.inference_mode() and the transformations of torch.func.

    Batch norm in training mode makes an image depend on all latents of the batch; the lengths then are of their sum.

    >>> generator = torch.nn.Linear(8, 12)
    >>> loss = path_length(generator, torch.randn(4, 8), target=1.0)
    >>> loss.backward()
    """
    if target is not None and not isinstance(target, Tensor) and not real_number("path_length: target", target) >= 0.0:
        raise ValueError(f"path_length: target is {target}; it must be 0 or more")
    value, _ = _penalised(
        generator, latents, lambda mean: mean if target is None else target, weight, noise, random, generator_args,
        generator_kwargs,
    )  # fmt: skip
    return value


class PathLength:
    """:func:`path_length` with the paper's target: a moving average of the lengths, a ← a + ``decay`` (mean ℓ - a),
    which starts at 0 and takes the present lengths in before it is used. ``state_dict`` has it.

    In the paper it is computed at every eighth step, with eight times the ``weight``.

    >>> penalty = PathLength()
    >>> generator = torch.nn.Linear(8, 12)
    >>> penalty(generator, torch.randn(4, 8)).backward()
    >>> 0.0 < penalty.mean.item() < 1.0
    True
    """

    def __init__(self, *, weight: float = 2.0, decay: float = 0.01) -> None:
        if not 0.0 < real_number("PathLength: decay", decay) <= 1.0:
            raise ValueError(f"PathLength: decay must be above 0 and at most 1, got {decay}")
        self.weight, self.decay = real_number("PathLength: weight", weight), decay
        self.mean = torch.zeros(())

    def __call__(self, generator: Generator, latents: Tensor, **options: Any) -> Tensor:
        def moved(mean: Tensor) -> Tensor:
            return self.mean.to(mean).lerp(mean, self.decay)

        options = {"weight": self.weight, "noise": None, "random": None, "generator_args": (), "generator_kwargs": None,
                   **options}  # fmt: skip
        value, self.mean = _penalised(generator, latents, moved, **options)
        return value

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        mean = state["mean"]
        if not isinstance(mean, Tensor) or mean.ndim or not mean.is_floating_point():
            raise ValueError(f"PathLength: the saved mean must be a floating-point scalar, got {shown(mean)}")
        self.mean = mean.clone()

    def __repr__(self) -> str:
        return f"PathLength(weight={self.weight!r}, decay={self.decay!r})"


def _penalised(
    generator: Generator,
    latents: Tensor,
    target_of: Callable[[Tensor], Tensor | float],
    weight: float,
    noise: Tensor | None,
    random: torch.Generator | None,
    generator_args: Sequence[Any],
    generator_kwargs: Mapping[str, Any] | None,
) -> tuple[Tensor, Tensor]:
    """The penalty, and the target that ``target_of`` gave for the mean length."""
    name = "path_length"
    check_callable(name, "generator", generator)
    _checks.number(name, "weight", weight)
    check_generator(name, "random", random)
    if noise is not None and not isinstance(noise, Tensor):
        raise TypeError(f"{name}: noise is {shown(noise)}; it must be a tensor of the images' shape, or None")
    check_conditions(name, "generator_args", generator_args, "generator_kwargs", generator_kwargs)
    (latents,) = samples_of(name, "latents", (latents,))
    if latents.ndim not in (2, 3) or not latents.numel():
        raise ValueError(f"{name}: latents must be [N, D] or [N, L, D] and not empty, got {tuple(latents.shape)}")
    check_surroundings(name, "generator")
    layers = latents.shape[1] if latents.ndim == 3 else 1
    kept: list[Tensor] = []

    def along(images: Any) -> Tensor:
        """⟨G(w), y⟩ of each sample."""
        if not isinstance(images, Tensor) or images.ndim < 2 or images.shape[0] != latents.shape[0]:
            raise ValueError(f"{name}: the generator must return [{latents.shape[0]}, C, ...], got {shown(images)}")
        wide = images.to(torch.promote_types(images.dtype, torch.float32))
        drawn = noise
        if drawn is None:
            drawn = torch.randn(wide.shape, generator=random, dtype=wide.dtype, device=wide.device)
        elif drawn.shape != wide.shape:
            raise ValueError(f"{name}: noise must be of the images' shape {tuple(wide.shape)}, got {shown(drawn)}")
        return (wide * drawn.to(wide)).flatten(1).sum(1) / prod(wide.shape[2:]) ** 0.5

    def penalty(gradients: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        (gradient,) = gradients
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        lengths = (wide.flatten(1).square().sum(1) / layers).sqrt()
        target = torch.as_tensor(target_of(lengths.mean()), dtype=lengths.dtype, device=lengths.device).detach()
        kept.append(target)
        away = lengths - target
        # d/dg of (ℓ - a)² is 2 (ℓ - a) g / (L ℓ); a length of 0 has no direction.
        scale = (2.0 * weight / (len(lengths) * layers)) * torch.where(lengths > 0, away / lengths, 0.0)
        direction = wide * scale.view(-1, *[1] * (wide.ndim - 1))
        return weight * away.square().mean(), [direction.to(gradient.dtype)]

    arguments = (generator, [latents], penalty, along, tuple(generator_args), dict(generator_kwargs or {}))
    value = _hand_out_to(generator, *_by_double_backward(name, arguments), passed_by=False)
    return value, kept[0]
