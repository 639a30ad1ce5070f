"""The exceptions of losart: one base class, each also the built-in that fits."""


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


class NumericalError(LosartError, RuntimeError):
    """The model produced values that are not numbers."""
