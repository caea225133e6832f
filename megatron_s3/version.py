"""The version of this package, which every part of it may ask for."""

__version__ = "0.2.0"
