"""Which family's checkpoint an adapted model is."""

from __future__ import annotations

from dataclasses import dataclass

from losart.errors import OptionError


@dataclass(frozen=True)
class Family:
    """A family of losart's, and how its checkpoints say what they are.

    Attributes
    ----------
    name : str
        In losart's registry.
    model_type, architecture : str
        Of config.json.
    block_key : str
        Its key of the block length.
    """

    name: str
    model_type: str
    architecture: str
    block_key: str


FAST_DLLM = Family("Fast_dLLM_Qwen", "Fast_dLLM_Qwen", "Fast_dLLM_QwenForCausalLM", "bd_size")
_STABLE_DIFFCODER = Family("stable_diffcoder", "llama", "StableDiffcoderForCausalLM", "block_length")
_SDAR = Family("sdar", "sdar", "SDARForCausalLM", "block_size")
_FAMILIES = {
    ("llama", True): FAST_DLLM,  # with biases of 0
    ("qwen2", True): FAST_DLLM,
    ("llama", False): _STABLE_DIFFCODER,
    ("qwen3", False): _SDAR,
}


def family_of(model_type: str, shifted: bool) -> Family:
    """The family of a base's model type, with rows that predict the next token (`shifted`) or their own.

    Raises
    ------
    OptionError
        There is none.
    """
    if (model_type, shifted) not in _FAMILIES:
        rows = "the row before it" if shifted else "its own row"
        raise OptionError(
            f"no family has {model_type}'s layers and predicts a token by {rows}: train with "
            f"--rows {'own' if shifted else 'shifted'}"
        )
    return _FAMILIES[model_type, shifted]
