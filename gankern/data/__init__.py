"""Images and points that ship with packages, are drawn, or lie in a folder, and endless batches that can be resumed."""

from gankern.data.augment import AUGMENTATIONS, augment
from gankern.data.batches import EndlessBatches
from gankern.data.drawn import Outlined, Photos, Scenes, Turning
from gankern.data.files import BrokenFile, ImageFolder, ImagePairs, UnpairedImages, cifar10
from gankern.data.given import wrap
from gankern.data.images import AT_ANY_SIZE, DATASETS, check, condition, labels, load, resize
from gankern.data.points import POINTS, EndlessPoints, Points
from gankern.data.shapes import Attributes, Factors, Shapes
from gankern.data.source import ImageSource

__all__ = [
    "AT_ANY_SIZE",
    "AUGMENTATIONS",
    "DATASETS",
    "POINTS",
    "Attributes",
    "BrokenFile",
    "EndlessBatches",
    "EndlessPoints",
    "Factors",
    "ImageFolder",
    "ImagePairs",
    "ImageSource",
    "Outlined",
    "Photos",
    "Points",
    "Scenes",
    "Shapes",
    "Turning",
    "UnpairedImages",
    "augment",
    "check",
    "cifar10",
    "condition",
    "labels",
    "load",
    "resize",
    "wrap",
]
