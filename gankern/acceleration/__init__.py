"""Turns the layers of an existing model into ours, reports, and puts them back."""

from gankern.acceleration._accelerate import accelerate, restore
from gankern.acceleration._report import Call, Measured, Report, Row

__all__ = ["Call", "Measured", "Report", "Row", "accelerate", "restore"]
