"""Everything that decides the numbers of a run, in one frozen record that is saved with every checkpoint."""

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from numbers import Integral, Real
from os import PathLike, fspath
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import torch
from torch import Tensor

from gankern import data, games, losses, models
from gankern.core.arguments import labels as check_labels
from gankern.core.arguments import seed as check_seed
from gankern.core.arguments import shown
from gankern.core.names import look_up
from gankern.data import ImageSource, Points, files
from gankern.data.augment import parse as parse_augment
from gankern.data.given import labels as labels_of
from gankern.models import layers as layer_tables
from gankern.models._record import RECORDS
from gankern.models.conditional import CONDITIONINGS

OPTIMISERS = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop, "sgd": torch.optim.SGD}

# What the networks' forward passes are computed in; None is without autocast.
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# Options that only change how others work -> those, one of which has to be asked for.
DEPENDENT = {
    "penalty_every": ("gradient_penalty", "zero_centered", "dragan", "r1", "r2"),
    "instance_noise_steps": ("instance_noise",),
    "lr_floor": ("decay_steps", "lr_decay"),
}

# Whether batch-coupled layers see one process's part of the batch, or all of it (see parallel.py).
COUPLINGS = {"local": False, "global": True}


@dataclass(frozen=True)
class Config:
    """One training run, as `gankern train` offers it. ``configure`` fills in a model's preset."""

    model: str
    data: str
    size: int | None  # images are size × size; None for points
    channels: int  # of an image, or coordinates of a point
    latent: int
    width: int  # channels of the networks' widest feature map
    loss: str
    layers: str = "gankern"
    compare: bool = False  # train twice in lockstep, on torch's layers and on gankern's
    steps: int = 1000
    batch_size: int = 64  # of a step, over all processes and parts
    lr: float = 2e-4
    beta1: float = 0.5
    beta2: float = 0.999
    optimiser: str = "adam"  # or "rmsprop" or "sgd", which have no use for beta1 and beta2
    momentum: float = 0.0  # of "sgd", at first
    momentum_end: float | None = None  # what it rises to; None: it stays
    momentum_steps: int = 0  # over so many steps, linearly
    decay_steps: int = 0  # the learning rates fall linearly to 0 over so many steps; 0: they stay
    lr_decay: float = 1.0  # the learning rates are divided by this after each step
    lr_floor: float = 0.0  # and never fall below this
    real_target: float = 1.0  # below 1: one-sided label smoothing
    clip: float | None = None  # every discriminator weight is clamped to ±clip after each of its steps
    gradient_penalty: float = 0.0  # λ of WGAN-GP's penalty
    drift: float = 0.0  # weight of the mean square of the real images' logits
    zero_centered: float = 0.0  # weights of the other penalties of gankern.penalties
    dragan: float = 0.0
    r1: float = 0.0
    r2: float = 0.0
    penalty_every: int = 1  # penalties at every so many discriminator steps only, with so many times the weight
    feature_matching: float = 0.0  # weight of feature matching in the generator's loss
    historical_average: float = 0.0  # weight of the distance to the average of past weights, for both players
    noisy_labels: float = 0.0  # probability of a discriminator step with the labels of real and fake exchanged
    instance_noise: float = 0.0  # standard deviation of noise on all that the discriminator sees
    instance_noise_steps: int = 0  # over which it falls linearly to 0; 0: it stays
    grow_steps: int = 0  # of a growing model: steps to train a resolution, and to fade in the next
    n_critic: int = 1  # discriminator steps for each generator step
    ema: float | None = None  # decay of the generator average that samples are drawn from; None samples the last one
    conditioning: str | None = None  # how labels or vectors come in, see models.conditional; None trains without
    num_classes: int = 0  # of the labels; the length of another condition
    minibatch_discrimination: int = 0  # similarity features of the discriminator
    generator_norm: str | None = None  # None is the model's own
    discriminator_norm: str | None = None
    accumulate: int = 1  # a batch goes through the networks in so many parts
    precision: str = "fp32"
    coupled: str = "local"
    evaluate: int = 0  # figures of merit at every so many checkpoints, and at the end; 0: never
    evaluate_samples: int = 2000
    features: str | None = None  # a TorchScript file for FID, KID and Inception score; None trains a classifier
    tensorboard: bool = False
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    checkpoint_every: int = 200
    options: dict[str, Any] = field(default_factory=dict)  # the game's own, see its Options
    on_error: str = "stop"  # at a broken file of the data; "skip" leaves it out
    flip: bool = False  # real images are mirrored, left to right, half of the time
    augment: str | None = None  # differentiable augmentation of what the discriminator sees: see gankern.data.augment
    workers: int = 0  # threads that read images
    keep: int = 0  # checkpoints that are kept as snapshots, the last ones
    best: str | None = None  # the figure of merit by which the best checkpoint is kept; see ``best_of``
    start_from: str | None = None  # another run, whose networks' weights are the first ones

    @property
    def side(self) -> int:
        """``size``, for what is made of images."""
        if self.size is None:
            raise ValueError(f"{self.model} is for images: it needs a size")
        return self.size

    def __post_init__(self) -> None:
        for option in fields(self):
            # A checkpoint holds plain values: what is as good as one becomes one.
            object.__setattr__(self, option.name, _plain(option, getattr(self, option.name)))
        check_seed("seed", self.seed)
        files.check_on_error(self.on_error)
        games.find(self.model).options_of(self.model, self.options)
        losses.get(self.loss, self.real_target)
        look_up(OPTIMISERS, self.optimiser, "optimiser")
        look_up(PRECISIONS, self.precision, "precision")
        look_up(COUPLINGS, self.coupled, "coupling (coupled)")
        layer_tables.get(self.layers)
        for name in ("steps", "batch_size", "n_critic", "threads", "checkpoint_every", "accumulate", "penalty_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {value}")
        for name in ("gradient_penalty", "zero_centered", "dragan", "r1", "r2", "drift", "feature_matching",
                     "historical_average", "instance_noise", "instance_noise_steps", "grow_steps", "decay_steps",
                     "momentum_steps", "lr_floor", "evaluate", "minibatch_discrimination", "keep",
                     "workers"):  # fmt: skip
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.evaluate_samples < 100:
            raise ValueError(f"evaluate_samples must be at least 100, got {self.evaluate_samples}")
        if self.grow_steps and self.model not in models.GROWING:
            raise ValueError(f"grow_steps is for {', '.join(models.GROWING)}; {self.model} does not grow")
        if self.augment is not None:
            parse_augment(self.augment)
        if self.size is None and (self.flip or self.augment is not None or self.features is not None):
            raise ValueError("flip, augment and features are for images, not for points")
        if self.best is not None:
            best_of(self.best)
            if not self.evaluate:
                raise ValueError(f"best={self.best} needs figures of merit: evaluate must be at least 1 (--evaluate 1)")
        _check_device_name(self.device)
        if not 1.0 <= self.lr_decay < float("inf"):
            raise ValueError(f"lr_decay must be 1 (the learning rates stay) or more, got {self.lr_decay}")
        if not 0.0 <= self.noisy_labels <= 1.0:
            raise ValueError(f"noisy_labels must be a probability from 0 to 1, got {self.noisy_labels}")
        if self.optimiser != "sgd" and (self.momentum or self.momentum_end is not None):
            raise ValueError(f"momentum is of the optimiser sgd; {self.optimiser} has none")
        if (self.momentum_end is not None) != (self.momentum_steps > 0):
            raise ValueError(
                "momentum_end and momentum_steps go together: what the momentum rises to, and over how long"
            )
        for name in ("beta1", "beta2", "ema", "momentum", "momentum_end"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}")

        self._refuse_what_the_game_has_no_use_for()
        self._refuse_what_other_options_have_no_use_for()

    def _refuse_what_other_options_have_no_use_for(self) -> None:
        usual = {option.name: option.default for option in fields(self)}
        asked = {name for name, default in usual.items() if getattr(self, name) != default}
        for name, others in DEPENDENT.items():
            if name in asked and not asked.intersection(others):
                raise ValueError(f"{name} has no effect without {' or '.join(others)}, got {getattr(self, name)}")
        betas = [name for name in ("beta1", "beta2") if name in asked]
        if betas and self.optimiser != "adam":
            raise ValueError(
                f"{betas[0]} is of the optimiser adam; {self.optimiser} has none: leave it out, or at "
                f"{usual[betas[0]]}, got {getattr(self, betas[0])}"
            )

    def _refuse_what_the_game_has_no_use_for(self) -> None:
        game = games.find(self.model)
        for option in fields(self):
            if option.name in games.ADVERSARIAL_OPTIONS - game.takes and getattr(self, option.name) != option.default:
                taking = [name for name in games.names() if option.name in games.find(name).takes]
                raise ValueError(f"{option.name} is an option of {', '.join(taking)}; {self.model} has no use for it")
        if game.own_loss and (self.loss != preset(self.model)["loss"] or self.real_target != 1.0):
            raise ValueError(f"loss and real_target: the losses of {self.model} are its own, and take no other")
        if self.ema is not None and game.averaged is None:
            having = [name for name in games.names() if games.find(name).averaged is not None]
            raise ValueError(f"ema: {self.model} keeps no average; {', '.join(having)} do")

    @property
    def sides(self) -> tuple[str, ...]:
        """The sets of layers that are trained."""
        return ("torch", "gankern") if self.compare else (self.layers,)

    def architecture(self) -> dict[str, Any]:
        """The options of ``models.build``, less the layers."""
        options: dict[str, Any] = {"latent": self.latent, "width": self.width}
        if self.model in models.FOR_POINTS:
            options["dimensions"] = self.channels
        else:
            options |= {"size": self.size, "channels": self.channels}
        if self.conditioning is not None:
            options |= {"num_classes": self.num_classes, "conditioning": self.conditioning}
        for name in ("minibatch_discrimination", "generator_norm", "discriminator_norm"):
            if getattr(self, name):
                options[name] = getattr(self, name)
        return options


def check_here(config: Config) -> None:
    """Raises unless this machine has what a run is computed with; a configuration is read where it is not, too."""
    if config.features is not None and not Path(config.features).is_file():
        raise ValueError(f"features: there is no TorchScript file {config.features}")
    check_device(config.device)


def check_device(name: str) -> None:
    """Raises unless that is a device of this machine: cpu, cuda or cuda:N."""
    _check_device_name(name)
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: this torch ({torch.__version__}) finds no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices, from cuda:0 on")


def _check_device_name(name: str) -> None:
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}")


# Figures of merit that are better the higher they are; all others that are known here, the lower.
HIGHER = ("inception_score", "modes_covered", "high_quality", "precision", "recall", "accuracy", "diversity")
LOWER = ("fid", "kid", "swd", "sliced_wasserstein", "wasserstein_estimate")


def best_of(best: str) -> tuple[str, int]:
    """The figure of merit by which a checkpoint is the best, and 1 where it is better the higher, -1 the lower.

    What a game has of its own is named with its direction.

    >>> best_of("fid"), best_of("inception_score"), best_of("max:purity")
    (('fid', -1), ('inception_score', 1), ('purity', 1))
    """
    direction, colon, name = best.partition(":")
    if colon and name and direction in ("min", "max"):
        return name, 1 if direction == "max" else -1
    if best in HIGHER + LOWER:
        return best, 1 if best in HIGHER else -1
    raise ValueError(
        f"best must be one of {', '.join(LOWER + HIGHER)}, or min:NAME or max:NAME for another figure, got {best!r}"
    )


def _types(field: Field) -> tuple[type, ...]:
    """What a field's values may be."""
    return (dict,) if get_origin(field.type) is dict else get_args(field.type) or (field.type,)


def _plain(field: Field, value: Any) -> Any:
    """A value of a field's type; a TypeError that names the field otherwise."""
    accepted = _types(field)
    if type(value) in accepted:
        return value
    if isinstance(value, Integral) and not isinstance(value, bool) and {int, float} & {*accepted}:
        return int(value) if int in accepted else float(value)
    if isinstance(value, Real) and not isinstance(value, Integral) and float in accepted:
        return float(value)
    if isinstance(value, str | PathLike) and str in accepted:
        return str(fspath(value))
    names = " or ".join("None" if kind is NoneType else kind.__name__ for kind in accepted)
    raise TypeError(f"{field.name} must be {names}, got {shown(value)}")


def check_samples(samples: Any) -> None:
    """Raises unless these are what a model can be trained on."""
    if isinstance(samples, Points | ImageSource):
        return
    if not isinstance(samples, Tensor):
        raise TypeError(f"samples must be images [N, C, H, W], an ImageSource or Points, got {shown(samples)}")
    if samples.ndim != 4 or not samples.is_floating_point():
        raise ValueError(
            f"samples must be images [N, C, H, W] of floating-point numbers in [-1, 1], got {shown(samples)}"
        )


def check_condition(kind: str, condition: Any, number: int, length: int | None = None) -> Any:
    """The condition of a kind of CONDITIONINGS: labels [N] below ``length``, or vectors [N, length]."""
    if kind == "labels":
        return check_labels("labels", condition, number, length)
    if not isinstance(condition, Tensor | ImageSource) or len(condition.shape) != 2 or len(condition) != number:
        raise ValueError(f"{kind} must be [{number}, M], got {shown(condition)}")
    if length is not None and condition.shape[1] != length:
        raise ValueError(f"{kind} must be [{number}, {length}], got {tuple(condition.shape)}")
    return condition


# What differs from Config's defaults.
PRESETS: dict[str, dict[str, Any]] = {name: dict(record.preset) for name, record in RECORDS.items()}


def preset(model: str) -> Mapping[str, Any]:
    """What differs from Config's defaults for a model or game."""
    return PRESETS[model] if model in PRESETS else games.find(model).preset


# What a resumed run may change: how far and how often, not what is computed.
MAY_CHANGE_ON_RESUME = ("steps", "threads", "checkpoint_every", "evaluate", "tensorboard", "device", "keep", "best")


def taken(model: str, conditioning: str | None, samples: Any, labels: Any) -> tuple[Any, Any]:
    """Samples and labels, or another condition, as a run takes them; the samples' own, where it needs some."""
    samples = data.wrap(samples)
    check_samples(samples)
    kind = CONDITIONINGS.get(conditioning or "", games.find(model).needs)
    if labels is None and kind == "labels":
        labels = labels_of(samples)
    elif labels is None and kind is not None and isinstance(samples, ImageSource):
        labels = samples.conditions.get(kind)
    elif labels is not None and not isinstance(labels, Tensor | ImageSource):
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"labels must be integers [N], in a tensor or a list, got {shown(labels)}") from error
    return samples, labels


def configure(model: str, data_name: str, samples: Any, labels: Any = None, **given: Any) -> Config:
    """The model's preset for these images or points, changed by every option that is not None.

    ``samples`` are anything that :func:`gankern.data.wrap` takes, and ``data_name`` is what they are called: a name of
    your own. ``labels`` [N] are needed for an option ``conditioning``; a data set's own are taken where none are given.
    """
    samples, labels = taken(model, given.get("conditioning"), samples, labels)
    game = games.find(model)
    options = dict(preset(model), threads=torch.get_num_threads())
    if (given.get("optimiser") or options.get("optimiser", "adam")) != "adam":
        options = {name: value for name, value in options.items() if name not in ("beta1", "beta2")}
    options.update((name, value) for name, value in given.items() if value is not None)
    points, for_points = isinstance(samples, Points), games.for_points(model)
    if points != for_points:
        kinds = ("images", "points")
        others = [name for name in games.names() if not games.for_points(name)]
        raise ValueError(
            f"{model} is for {kinds[for_points]}, and {data_name} are {kinds[points]}: pass --data "
            f"{' or '.join(data.POINTS if for_points else data.DATASETS)}"
            + ("" if points else f", or another model: {', '.join(others)}")
        )
    if game.needs is not None and labels is None:
        raise ValueError(f"{model} needs {game.needs}, and {data_name} has none")
    if isinstance(samples, Points):
        if options.get("size") is not None:
            raise ValueError(f"{data_name} are points in the plane: they have no --size")
        options["size"], channels = None, samples.sample(1, None).shape[1]
    else:
        channels, height, width = samples.shape[1:]
        size = options.setdefault("size", height)
        if (height, width) != (size, size):
            raise ValueError(
                f"the images of {data_name} are {height}x{width} and the model was asked for {size}x{size}: "
                f"pass --size {height}, or --resize to resize the images"
            )
    if options.get("conditioning") is not None:
        kind = look_up(CONDITIONINGS, options["conditioning"], "conditioning")
        if labels is None or isinstance(samples, Points):
            raise ValueError(f"conditioning={options['conditioning']} needs {kind}, and {data_name} has none")
        labels = check_condition(kind, labels, len(samples))
    if labels is not None and (options.get("conditioning") is not None or game.needs is not None):
        options["num_classes"] = int(labels.max()) + 1 if len(labels.shape) == 1 else labels.shape[1]
    config = Config(model=model, data=data_name, channels=channels, **options)
    check_here(config)
    return config


def reconfigure(saved: Config, **given: Any) -> Config:
    """The configuration of a resumed run: the saved one, with what may change changed."""
    given = {name: value for name, value in given.items() if value is not None}
    options = given.pop("options", {})
    for name, value in given.items():
        if name not in MAY_CHANGE_ON_RESUME and getattr(saved, name) != value:
            raise ValueError(
                f"the checkpoint was trained with {name}={getattr(saved, name)}, not {name}={value}: "
                f"a resumed run may only change {', '.join(MAY_CHANGE_ON_RESUME)}"
            )
    options_of = games.find(saved.model).options_of
    before, asked = (asdict(options_of(saved.model, of)) for of in (saved.options, options))
    for name in options:
        if asked[name] != before[name]:
            raise ValueError(
                f"the checkpoint was trained with {name}={before[name]}, not {name}={asked[name]}: a resumed run keeps "
                "its game's options"
            )
    config = Config(**asdict(saved) | given)
    check_here(config)
    return config


# Found out from the data, so a file that has them may be for other data.
_FOUND_OUT = ("channels", "num_classes")


def read_options(path: Path | str) -> dict[str, Any]:
    """The options in a TOML or JSON file, a run's config.json or record.json among them; null is "not given".

    Raises a ValueError with the nearest names for an option that does not exist, or a value of another type.
    """
    readers = {".toml": tomllib.loads, ".json": json.loads}
    path = Path(path)
    try:
        content = look_up(readers, path.suffix, "kind of configuration file")(path.read_text())
    except (json.JSONDecodeError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not {path.suffix[1:].upper()}: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("config"), dict):
        content = content["config"]  # a record
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold options and their values, got a {type(content).__name__}")
    types = {field.name: _types(field) for field in fields(Config)}
    options = {}
    for name, value in content.items():
        accepted = look_up(types, name, f"option in {path}")
        if type(value) is int and float in accepted:
            value = float(value)
        if value is not None and type(value) not in accepted:
            names = " or ".join(kind.__name__ for kind in accepted if kind is not NoneType)
            raise ValueError(f"{path}: {name} must be {names}, got {value!r}")
        if name not in _FOUND_OUT:
            options[name] = value
    return options
