"""Training a GAN: one loop, for one set of layers or for stock torch and gankern in lockstep."""

from gankern.games._config import (
    COUPLINGS,
    OPTIMISERS,
    PRECISIONS,
    PRESETS,
    Config,
    check_device,
    configure,
    read_options,
    reconfigure,
)
from gankern.training.checkpoint import CHECKPOINT, Checkpoint, CheckpointError, TrainingError, load_generator
from gankern.training.export import KINDS as EXPORTS
from gankern.training.export import export
from gankern.training.graphed import GraphedStep, NotCaptured
from gankern.training.loop import Diverged, Interrupted, OutputInUse, OutputLost, died_at_once, find_run, train
from gankern.training.trainer import Trainer

__all__ = [
    "CHECKPOINT",
    "COUPLINGS",
    "EXPORTS",
    "OPTIMISERS",
    "PRECISIONS",
    "PRESETS",
    "Checkpoint",
    "CheckpointError",
    "Config",
    "Diverged",
    "GraphedStep",
    "Interrupted",
    "NotCaptured",
    "OutputInUse",
    "OutputLost",
    "Trainer",
    "TrainingError",
    "check_device",
    "configure",
    "died_at_once",
    "export",
    "find_run",
    "load_generator",
    "read_options",
    "reconfigure",
    "train",
]
