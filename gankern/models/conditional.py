"""What labels, or vectors of numbers, do to a model: the two published ways, for every model here.

*Concatenation* (Mirza & Osindero 2014, arXiv 1411.1784): one-hot labels are appended to the latents, and as constant
channels to the discriminator's images. *Projection* (Miyato & Koyama 2018, arXiv 1802.05637): the logit gains the inner
product of the features with an embedding of the label, and the generator's batch norms are conditional on it; a
generator without batch norm gets the one-hot labels appended to its latents.

A vector of real numbers (attributes, say) takes the place of the one-hot labels: *vector_concatenation* appends it as
it is, *vector_projection* maps it linearly where labels are looked up (in the discriminator; generators append it).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gankern.core.arguments import floats, shown, tensor, whole
from gankern.core.arguments import labels as check_labels
from gankern.core.names import look_up
from gankern.models.gan import GAN
from gankern.models.layers import CONDITIONAL, Layers
from gankern.nn.coupling import apart

# How a condition comes in -> what it is, as gankern.data calls it.
CONDITIONINGS = {
    "projection": "labels",
    "concatenation": "labels",
    "vector_projection": "attributes",
    "vector_concatenation": "attributes",
}
NORMS = {"batch": lambda layers: layers.batch_norm_act, "virtual": lambda layers: layers.virtual_batch_norm_act}


def apply_norm_act(layer: nn.Module, x: Tensor, labels: Tensor | None) -> Tensor:
    """``layer(x)``, with the labels if it is conditional on them."""
    return layer(x, labels) if isinstance(layer, CONDITIONAL) else layer(x)


@apart
class Head(nn.Module):
    """Features [N, F] → logits [N]: a linear layer, and what papers put before and beside it.

    ``minibatch_discrimination`` is the number of similarity features appended (Salimans 2016, with kernels of
    dimension 5). With ``num_classes`` the logit gains ⟨embedding of the label, features⟩; for vectors [N, num_classes]
    in place of labels the embedding is the linear map that one-hot labels would see.
    """

    def __init__(
        self,
        features: int,
        layers: Layers,
        num_classes: int = 0,
        minibatch_discrimination: int = 0,
        linear: Callable[[int, int], nn.Module] | None = None,
    ):
        super().__init__()
        if whole("minibatch_discrimination", minibatch_discrimination) < 0:
            raise ValueError(
                f"minibatch_discrimination must be 0 (none) or the number of features, got {minibatch_discrimination}"
            )
        self.similarity = None
        if minibatch_discrimination:
            self.similarity = layers.minibatch_discrimination(features, minibatch_discrimination, 5)
        self.linear = (linear or layers.linear)(features + minibatch_discrimination, 1)
        self.embedding = nn.Embedding(num_classes, features) if num_classes else None
        if self.embedding is not None:
            nn.init.xavier_uniform_(self.embedding.weight)

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.linear(self.similarity(features) if self.similarity else features).flatten()
        if self.embedding is None:
            return logits
        assert labels is not None  # whoever wraps the network has seen to that
        vectors = labels @ self.embedding.weight if labels.is_floating_point() else self.embedding(labels)
        return logits + (vectors * features).sum(1)


@apart
class _WithLabels(nn.Module):
    """A network called with inputs and labels, or ``vectors`` [N, num_classes]. Checks these, and appends them to the
    inputs if that is asked."""

    def __init__(self, network: nn.Module, num_classes: int, append: bool, pass_on: bool, vectors: bool):
        super().__init__()
        self.vectors = vectors
        self.network = network
        self.num_classes = num_classes
        self.append = append
        self.pass_on = pass_on

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            if self.vectors:
                raise ValueError(f"this model has a condition: call it with vectors [N, {self.num_classes}]")
            raise ValueError(f"this model has {self.num_classes} classes: call it with labels, [N] integers")
        number = tensor("the model's input", x).shape[0]
        if self.vectors:
            if floats("the condition", labels).shape != (number, self.num_classes):
                raise ValueError(f"the condition must be [{number}, {self.num_classes}], got {shown(labels)}")
            labels = labels.to(x.dtype)
        else:
            # Values on another device than the CPU are not looked at, which would wait for it: the lookup itself fails.
            labels = check_labels("labels", labels, number, self.num_classes)
        if self.append:
            beside = labels if self.vectors else F.one_hot(labels, self.num_classes).to(x.dtype)
            beside = beside.view(*beside.shape, *(1 for _ in x.shape[2:])).expand(-1, -1, *x.shape[2:])
            x = torch.cat([x, beside], 1)
        return self.network(x, labels) if self.pass_on else self.network(x)


@dataclass(frozen=True)
class Conditioning:
    """How a model of ``num_classes`` classes, or of vectors of that length (0: none), takes its condition.

    ``conditional_norms`` says whether its generator has batch norms that can be conditional.
    """

    num_classes: int
    how: str
    conditional_norms: bool = True

    def __post_init__(self) -> None:
        look_up(CONDITIONINGS, self.how, "conditioning")
        if whole("num_classes", self.num_classes) < 0:
            raise ValueError(f"num_classes must be 0 (no labels) or more, got {self.num_classes}")

    @property
    def vectors(self) -> bool:
        return CONDITIONINGS[self.how] != "labels"

    @property
    def head_classes(self) -> int:
        """Classes that the discriminator's head embeds."""
        return self.num_classes if self.how in ("projection", "vector_projection") else 0

    @property
    def norm_classes(self) -> int:
        """Classes that the generator's batch norms know."""
        return self.head_classes if self.conditional_norms and not self.vectors else 0

    @property
    def latent_classes(self) -> int:
        """What one-hot labels add to the length of the latents."""
        return self.num_classes - self.norm_classes

    @property
    def image_classes(self) -> int:
        """What one-hot labels add to the channels of the discriminator's images."""
        return self.num_classes - self.head_classes

    def wrap(self, gan: GAN) -> GAN:
        """The model whose networks are called with labels; the model itself if there are no classes."""
        if not self.num_classes:
            return gan
        generator = _WithLabels(
            gan.generator, self.num_classes, bool(self.latent_classes), bool(self.norm_classes), self.vectors
        )
        discriminator = _WithLabels(
            gan.discriminator, self.num_classes, bool(self.image_classes), bool(self.head_classes), self.vectors
        )
        return replace(gan, generator=generator, discriminator=discriminator, num_classes=self.num_classes)


@dataclass(frozen=True)
class GeneratorNorms:
    """Constructors channels → normalisation and ReLU: for the layers inside, and for one that stays unconditional."""

    inner: Callable[[int], nn.Module]
    last: Callable[[int], nn.Module]


def generator_norms(name: str, labels: Conditioning, layers: Layers) -> GeneratorNorms:
    """The norms of that name, conditional inside where there are labels for them."""
    plain = look_up(NORMS, name, "generator_norm")(layers)
    if not labels.norm_classes:
        return GeneratorNorms(plain, plain)
    return GeneratorNorms(partial(layers.conditional_batch_norm_act, num_classes=labels.norm_classes), plain)
