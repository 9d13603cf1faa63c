"""A GAN in the plane in motion: recorded while it trains (``recording``), played by one HTML file (``page``)."""

from gankern.theory.play.page import write_page
from gankern.theory.play.recording import DATA, LOSSES, Recording, record

__all__ = ["DATA", "LOSSES", "Recording", "record", "write_page"]
