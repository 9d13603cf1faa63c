"""Instruments that look at a trained or new network and say what is wrong with it, and where."""

from gankern.diagnostics.checkerboard import Report, Stage, checkerboard, latents

__all__ = ["Report", "Stage", "checkerboard", "latents"]
