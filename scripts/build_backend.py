"""setuptools' build backend, which asks for torch, CMake and the rest only where the native library is built."""

import os

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

NATIVE = ["cmake>=3.22", "ninja", "pybind11>=2.13", "torch>=2.11"]


def _native() -> list[str]:
    return NATIVE if os.environ.get("GANKERN_BUILD_NATIVE", "1") != "0" else []


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_native()]


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_native()]
