"""Images and points that ship with packages, are drawn, or lie in a folder, and endless batches that can be resumed."""

from gankern.data.batches import EndlessBatches
from gankern.data.files import BrokenFile, ImageFolder, cifar10
from gankern.data.images import CONDITIONS, DATASETS, check, condition, labels, load, resize
from gankern.data.points import POINTS, EndlessPoints, Points
from gankern.data.shapes import Factors, Shapes
from gankern.data.source import ImageSource

__all__ = [
    "CONDITIONS",
    "DATASETS",
    "POINTS",
    "BrokenFile",
    "EndlessBatches",
    "EndlessPoints",
    "Factors",
    "ImageFolder",
    "ImageSource",
    "Points",
    "Shapes",
    "check",
    "cifar10",
    "condition",
    "labels",
    "load",
    "resize",
]
