"""Reading checkpoints from disk: configuration, mapped tensors, tokenizer, chat template."""

from losart.loaders.chat_template import ChatTemplate
from losart.loaders.checkpoint import Checkpoint, open_checkpoint
from losart.loaders.families import SUPPORTED_MODEL_TYPES
from losart.loaders.quantized import QuantizedTensor
from losart.loaders.safetensors_files import MappedTensor
from losart.loaders.tokenizer import Prompt, Tokenizer, is_batch, prompt_ids

__all__ = [
    "SUPPORTED_MODEL_TYPES",
    "ChatTemplate",
    "Checkpoint",
    "MappedTensor",
    "Prompt",
    "QuantizedTensor",
    "Tokenizer",
    "is_batch",
    "open_checkpoint",
    "prompt_ids",
]
