"""What a model is: two networks and the length of the latent vector between them."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class GAN:
    """``generator``: [N, latent] → images [N, C, H, W] in [−1, 1]. ``discriminator``: images → logits [N].

    With ``num_classes`` both are called with labels too: ``generator(latents, labels)``, labels [N] integers, or
    vectors [N, num_classes] where the conditioning is of vectors.
    """

    generator: nn.Module
    discriminator: nn.Module
    latent: int
    num_classes: int = 0
