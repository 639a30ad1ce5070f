"""losart: a small runtime for block-wise diffusion language models.

import losart

model = losart.load("path/to/SDAR-1.7B-Chat")
print(model.generate("Why is the sky blue?", attention="losa"))
"""

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
    PrefixError,
    PromptError,
    TensorError,
    TraceError,
    explain_unbuilt,
)
from losart.observe.engine_stats import EngineStats
from losart.observe.step import GenerationResult, ObservedLayer, Stats, Step, TokenLogprob
from losart.observe.trace import Trace, TraceWriter, read_trace
from losart.version import __version__

try:
    from losart.api.chat import Chat
    from losart.api.engine import Engine
    from losart.api.fetch import fetch
    from losart.api.model import Model, generate, load
    from losart.api.scoring import Score
    from losart.api.session import Session
    from losart.measure.random_checkpoint import write_size as random_checkpoint
except ModuleNotFoundError as error:
    explain_unbuilt(error)
    raise

__all__ = [
    "AttentionConfig",
    "Chat",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DeviceError",
    "Engine",
    "EngineStats",
    "GenerationConfig",
    "GenerationResult",
    "LosartError",
    "Model",
    "ModelConfig",
    "NumericalError",
    "ObservedLayer",
    "OptionError",
    "OutOfMemoryError",
    "PrefixError",
    "PromptError",
    "Score",
    "Session",
    "Stats",
    "Step",
    "TensorError",
    "TokenLogprob",
    "Trace",
    "TraceError",
    "TraceWriter",
    "__version__",
    "fetch",
    "generate",
    "load",
    "random_checkpoint",
    "read_trace",
]
