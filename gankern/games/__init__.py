"""Games: what differs from one GAN to the next, one file a system; ``gankern train NAME`` plays ``games/NAME.py``.

:class:`gankern.games.Game` says what a game has to say: its networks, its players, and its moves. The models of
:mod:`gankern.models`, a generator against a discriminator, all play :mod:`gankern.games.adversarial`.
"""

from __future__ import annotations

import importlib
import pkgutil

from gankern import models
from gankern.core.names import look_up
from gankern.games._game import Game, Picture, Player, Run

__all__ = ["ADVERSARIAL_OPTIONS", "Game", "Picture", "Player", "Run", "find", "for_points", "names"]

_ADVERSARIAL = "adversarial"

# The options of every run that only a generator against a discriminator takes, unless a game says so (``Game.takes``).
ADVERSARIAL_OPTIONS = frozenset(
    {
        *("clip", "gradient_penalty", "drift", "zero_centered", "dragan", "r1", "r2", "penalty_every", "n_critic"),
        *("feature_matching", "historical_average", "noisy_labels", "instance_noise", "instance_noise_steps"),
        *("augment", "grow_steps", "conditioning", "minibatch_discrimination", "generator_norm", "discriminator_norm"),
        *("evaluate_samples", "features"),
    }
)


def names() -> dict[str, str]:
    """The name of every game that can be trained -> the module of this package that plays it.

    >>> names()["sngan"], "infogan" in names()
    ('adversarial', True)
    """
    files = [info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_")]
    return dict.fromkeys(models.MODELS, _ADVERSARIAL) | {name: name for name in files if name != _ADVERSARIAL}


def for_points(name: str) -> bool:
    """Whether the game of that name is for points in the plane; the others are for images."""
    return name in models.FOR_POINTS if name in models.MODELS else find(name).points


def find(name: str) -> type[Game]:
    """The class of the game of that name; a ValueError with the nearest names if there is none."""
    module = importlib.import_module(f"{__name__}.{look_up(names(), name, 'model')}")
    games = [g for g in vars(module).values() if isinstance(g, type) and issubclass(g, Game)]
    (game,) = (g for g in games if g.__module__ == module.__name__)
    return game
