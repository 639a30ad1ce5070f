"""Immutable configuration: of a model, of a generation, of its attention."""

from losart.config.model import ModelConfig
from losart.config.options import AttentionConfig, GenerationConfig, generation_config
from losart.config.precision import DTYPES
from losart.config.rope import RopeConfig

__all__ = ["DTYPES", "AttentionConfig", "GenerationConfig", "ModelConfig", "RopeConfig", "generation_config"]
