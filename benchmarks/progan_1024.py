"""The paper's whole ProGAN at 1024×1024: one image through both networks and back, and the memory that takes.

python benchmarks/progan_1024.py            gankern's layers
python benchmarks/progan_1024.py torch      the same model of torch's
"""

from __future__ import annotations

import resource
import sys
import time

import torch

from gankern import models


def peak() -> float:
    """The process's largest resident memory so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    layers = sys.argv[1] if len(sys.argv) > 1 else "gankern"
    torch.manual_seed(0)
    gan = models.progan(size=1024, layers=layers)
    networks, before, begin = (gan.generator, gan.discriminator), peak(), time.perf_counter()
    logits = gan.discriminator(gan.generator(torch.randn(1, gan.latent)))
    forward = time.perf_counter() - begin
    logits.sum().backward()
    seconds = time.perf_counter() - begin
    gradients = [p.grad for network in networks for p in network.parameters() if p.grad is not None]
    if not all(gradient.isfinite().all() for gradient in gradients):
        raise RuntimeError("a gradient is not finite")
    print(
        f"{layers}: forward {forward:.1f} s, with backward {seconds:.1f} s, "
        f"peak {peak():.2f} GiB of resident memory ({before:.2f} with the weights alone)"
    )


if __name__ == "__main__":
    main()
