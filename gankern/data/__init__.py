"""Real images that ship inside Python packages, and an endless stream of batches that can be resumed."""

from gankern.data.batches import EndlessBatches
from gankern.data.images import DATASETS, load

__all__ = ["DATASETS", "EndlessBatches", "load"]
