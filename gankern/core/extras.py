"""Packages that not every installation has: imported when needed, and named in one sentence where they are missing."""

import importlib
from types import ModuleType

# A package as it is imported: its name on the package index, and the extra of gankern's that brings it.
EXTRAS = {
    "PIL": ("pillow", "train"),
    "jinja2": ("jinja2", "report"),
    "lightning_fabric": ("lightning-fabric", "train"),
    "matplotlib": ("matplotlib", "train"),
    "mlxtend": ("mlxtend", "train"),
    "onnx": ("onnx", "export"),
    "onnxruntime": ("onnxruntime", "export"),
    "onnxscript": ("onnxscript", "export"),
    "ot": ("POT", "train"),
    "safetensors": ("safetensors", "export"),
    "scipy": ("scipy", "filters"),
    "sklearn": ("scikit-learn", "train"),
    "tensorboard": ("tensorboard", "train"),
    "torch_fidelity": ("torch-fidelity", "fidelity"),
    "torchmetrics": ("torchmetrics", "metrics"),
}


def load(module: str, purpose: str, extra: str | None = None) -> ModuleType:
    """The module of that name; an ImportError that says what it is needed for, and which extra has it.

    ``extra`` is another one than the package's usual one, where the caller's needs more than this package.

    >>> load("matplotlib.nothing", "a picture")
    Traceback (most recent call last):
    ImportError: a picture needs matplotlib: pip install 'gankern[train]' (No module named 'matplotlib.nothing')
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package, usual = EXTRAS[module.partition(".")[0]]
        raise ImportError(f"{purpose} needs {package}: pip install 'gankern[{extra or usual}]' ({error})") from error
