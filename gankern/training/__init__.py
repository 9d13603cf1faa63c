"""Training a GAN: one loop, for one set of layers or for stock torch and gankern in lockstep."""

from gankern.games._config import (
    COUPLINGS,
    OPTIMISERS,
    PRECISIONS,
    PRESETS,
    Config,
    configure,
    read_options,
    reconfigure,
)
from gankern.training.checkpoint import Checkpoint, CheckpointError, TrainingError
from gankern.training.graphed import GraphedStep
from gankern.training.loop import CHECKPOINT, Diverged, Interrupted, OutputInUse, OutputLost, find_run, train
from gankern.training.trainer import Trainer

__all__ = [
    "CHECKPOINT",
    "COUPLINGS",
    "OPTIMISERS",
    "PRECISIONS",
    "PRESETS",
    "Checkpoint",
    "CheckpointError",
    "Config",
    "Diverged",
    "GraphedStep",
    "Interrupted",
    "OutputInUse",
    "OutputLost",
    "Trainer",
    "TrainingError",
    "configure",
    "find_run",
    "read_options",
    "reconfigure",
    "train",
]
