"""The version of losart."""

__version__ = "0.1.0"
