"""Immutable configuration: of a model, of a generation, of its attention."""

from losart.config.model import DTYPES, ModelConfig, RopeConfig
from losart.config.options import AttentionConfig, GenerationConfig, generation_config

__all__ = ["DTYPES", "AttentionConfig", "GenerationConfig", "ModelConfig", "RopeConfig", "generation_config"]
