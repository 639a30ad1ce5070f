"""The exceptions of losart: one base class, each also the built-in that fits."""

from __future__ import annotations

from pathlib import Path


class LosartError(Exception):
    """Base class of every error that losart raises on purpose."""


class CheckpointError(LosartError, OSError):
    """A checkpoint's file is missing, unreadable, truncated or corrupt."""


class TensorError(CheckpointError, ValueError):
    """A tensor is missing, unknown, or of the wrong shape or dtype."""


class ConfigError(LosartError, ValueError):
    """A checkpoint's configuration is impossible or not supported."""


class OptionError(LosartError, ValueError):
    """An option of the caller is unknown or out of range."""


class PromptError(LosartError, ValueError):
    """A prompt is empty, too long, out of the vocabulary, or cannot be tokenized."""


class DataError(LosartError, ValueError):
    """A data set is missing or not of the form that it should have."""


class DeviceError(LosartError, RuntimeError):
    """The asked-for device or its software is missing."""


class OutOfMemoryError(LosartError, MemoryError):
    """A model or a generation does not fit into the device's memory."""


class TraceError(LosartError, ValueError):
    """A trace file is damaged, or something else."""


class PrefixError(LosartError, ValueError):
    """A saved prefix is missing, damaged, or of another model, device or format."""


class NumericalError(LosartError, RuntimeError):
    """The model produced values that are not numbers."""


def explain_unbuilt(error: ModuleNotFoundError) -> None:
    """Raise an ImportError that names the build command, where a missing module is one that a build makes.

    Those are the Cython modules, and the packages that lie beside `losart/` in the source tree.
    """
    folder = Path(__file__).parents[1]
    name = error.name or ""
    beside = {"losart.loaders": "loaders", "losart.kernels_cu": "kernels_cu"}
    source = folder / beside[name] if name in beside else folder / f"{name.replace('.', '/')}.pyx"
    if (folder / "setup.py").exists() and source.exists():
        raise ImportError(
            f"losart is imported from sources that are not built: run `pip install -e .` in {folder}",
            name=name,
        ) from None
