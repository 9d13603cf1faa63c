"""Everything that decides the numbers of a run, in one frozen record that is saved with every checkpoint."""

from dataclasses import asdict, dataclass

import torch

from gankern import data, losses, models
from gankern._names import look_up
from gankern.models import layers as layer_tables


@dataclass(frozen=True)
class Config:
    """One training run, as `gankern train` offers it. ``configure`` fills in a model's preset."""

    model: str
    data: str
    size: int  # images are size × size
    channels: int
    latent: int
    width: int  # channels of the networks' widest feature map
    loss: str
    layers: str = "gankern"
    compare: bool = False  # train twice in lockstep, on torch's layers and on gankern's
    steps: int = 1000
    batch_size: int = 64
    lr: float = 2e-4
    beta1: float = 0.5
    beta2: float = 0.999
    optimiser: str = "adam"  # or "rmsprop", which has no use for beta1 and beta2
    real_target: float = 1.0  # below 1: one-sided label smoothing
    clip: float | None = None  # every discriminator weight is clamped to ±clip after each of its steps
    gradient_penalty: float = 0.0  # λ of WGAN-GP's penalty
    drift: float = 0.0  # weight of the mean square of the real images' logits
    grow_steps: int = 0  # of a growing model: steps to train a resolution, and to fade in the next
    n_critic: int = 1  # discriminator steps for each generator step
    ema: float | None = None  # decay of the generator average that samples are drawn from; None samples the last one
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    checkpoint_every: int = 200

    def __post_init__(self):
        look_up(models.MODELS, self.model, "model")
        data.check(self.data)
        losses.get(self.loss, self.real_target)
        look_up(OPTIMISERS, self.optimiser, "optimiser")
        layer_tables.get(self.layers)
        for name in ("steps", "batch_size", "n_critic", "threads", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive number, got {value}")
        for name in ("gradient_penalty", "drift", "grow_steps"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.grow_steps and self.model not in models.GROWING:
            raise ValueError(f"grow_steps is for {', '.join(models.GROWING)}; {self.model} does not grow")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device must be cpu, cuda or cuda:N, got {self.device!r}") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {self.device!r}: this torch ({torch.__version__}) finds no CUDA device")
        for name in ("beta1", "beta2", "ema"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be at least 0 and below 1, got {value}")

    @property
    def sides(self) -> tuple[str, ...]:
        """The sets of layers that are trained."""
        return ("torch", "gankern") if self.compare else (self.layers,)


OPTIMISERS = {"adam": torch.optim.Adam, "rmsprop": torch.optim.RMSprop}

# What differs from Config's defaults, at widths that train in minutes on a CPU.
PRESETS = {
    # Without momentum the two players do not chase each other in circles, and a larger step is stable.
    "sn_dcgan": {
        "loss": "hinge",
        "latent": 128,
        "width": 16,
        "lr": 1e-3,
        "beta1": 0.0,
        "beta2": 0.99,
        "ema": 0.99,
        "steps": 1500,
    },
    "dcgan": {"loss": "non_saturating", "latent": 100, "width": 32},
    "gan": {"loss": "non_saturating", "latent": 100, "width": 600},
    "wgan": {
        "loss": "wasserstein",
        "latent": 100,
        "width": 32,
        "optimiser": "rmsprop",
        "lr": 5e-5,
        "clip": 0.01,
        "n_critic": 5,
    },
    "wgan_gp": {
        "loss": "wasserstein",
        "latent": 128,
        "width": 32,
        "lr": 1e-4,
        "beta1": 0.0,
        "beta2": 0.9,
        "n_critic": 5,
        "gradient_penalty": 10.0,
    },
    "sngan": {"loss": "hinge", "latent": 128, "width": 16, "beta1": 0.0, "beta2": 0.9, "n_critic": 5},
    "progan": {
        "loss": "wasserstein",
        "latent": 64,
        "width": 64,
        "lr": 1e-3,
        "beta1": 0.0,
        "beta2": 0.99,
        "ema": 0.999,
        "gradient_penalty": 10.0,
        "drift": 1e-3,
        "batch_size": 16,
        "grow_steps": 150,
    },
}

# What a resumed run may change: how far and how often, not what is computed.
MAY_CHANGE_ON_RESUME = ("steps", "threads", "checkpoint_every")


def configure(model: str, data_name: str, images: torch.Tensor, **given) -> Config:
    """The model's preset for these images ([N, C, H, W]), changed by every option that is not None."""
    options = dict(look_up(PRESETS, model, "model"), threads=torch.get_num_threads())
    options.update((name, value) for name, value in given.items() if value is not None)
    channels, height, width = images.shape[1:]
    size = options.setdefault("size", height)
    if (height, width) != (size, size):
        raise ValueError(
            f"the images of {data_name} are {height}x{width} and the model was asked for {size}x{size}: "
            f"pass --size {height}, or --resize to resize the images"
        )
    return Config(model=model, data=data_name, channels=channels, **options)


def reconfigure(saved: Config, **given) -> Config:
    """The configuration of a resumed run: the saved one, with what may change changed."""
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name not in MAY_CHANGE_ON_RESUME and getattr(saved, name) != value:
            raise ValueError(
                f"the checkpoint was trained with {name}={getattr(saved, name)}, not {name}={value}: "
                f"a resumed run may only change {', '.join(MAY_CHANGE_ON_RESUME)}"
            )
    return Config(**asdict(saved) | given)
