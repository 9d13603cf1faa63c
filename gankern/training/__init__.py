"""Training a GAN: one loop, for one set of layers or for stock torch and gankern in lockstep."""

from gankern.training.checkpoint import Checkpoint, CheckpointError, TrainingError
from gankern.training.config import PRESETS, Config, configure, reconfigure
from gankern.training.loop import CHECKPOINT, Diverged, Interrupted, OutputInUse, train
from gankern.training.trainer import Trainer

__all__ = [
    "CHECKPOINT",
    "PRESETS",
    "Checkpoint",
    "CheckpointError",
    "Config",
    "Diverged",
    "Interrupted",
    "OutputInUse",
    "Trainer",
    "TrainingError",
    "configure",
    "reconfigure",
    "train",
]
