"""losart: a small runtime for block-wise diffusion language models.

import losart

model = losart.load("path/to/SDAR-1.7B-Chat")
print(model.generate("Why is the sky blue?", attention="losa"))
"""

from losart.chat import Chat
from losart.config import ModelConfig
from losart.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    LosartError,
    NumericalError,
    OptionError,
    OutOfMemoryError,
    PromptError,
    TensorError,
    TraceError,
)
from losart.model import Model, generate, load
from losart.observation import ObservedLayer, ObservedPass
from losart.options import AttentionConfig, GenerationConfig
from losart.results import GenerationResult, Stats, Step
from losart.session import Session
from losart.trace import Trace, TraceWriter, read_trace

__version__ = "0.1.0"

__all__ = [
    "AttentionConfig",
    "Chat",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "GenerationConfig",
    "GenerationResult",
    "LosartError",
    "Model",
    "ModelConfig",
    "NumericalError",
    "ObservedLayer",
    "ObservedPass",
    "OptionError",
    "OutOfMemoryError",
    "PromptError",
    "Session",
    "Stats",
    "Step",
    "TensorError",
    "Trace",
    "TraceError",
    "TraceWriter",
    "generate",
    "load",
    "read_trace",
]
