"""losart: a small runtime for block-wise diffusion language models.

import losart

model = losart.load("path/to/SDAR-1.7B-Chat")
print(model.generate("Why is the sky blue?", attention="losa"))
"""

from losart.api.chat import Chat
from losart.api.model import Model, generate, load
from losart.api.session import Session
from losart.config.model import ModelConfig
from losart.config.options import AttentionConfig, GenerationConfig
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
from losart.observe.observation import ObservedLayer, ObservedPass
from losart.observe.results import GenerationResult, Stats, Step
from losart.observe.trace import Trace, TraceWriter, read_trace

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
