"""Attention policies, one file each, and their registry."""

from losart.attention.dense import DensePolicy
from losart.attention.losa import LosaPolicy
from losart.attention.policy import AttentionPolicy
from losart.attention.quest import QuestPolicy
from losart.attention.sparsed import SparsedPolicy
from losart.config.model import ModelConfig
from losart.config.options import AttentionConfig
from losart.errors import OptionError

POLICIES: dict[str, type[AttentionPolicy]] = {
    "dense": DensePolicy,
    "losa": LosaPolicy,
    "quest": QuestPolicy,
    "sparsed": SparsedPolicy,
}


def make_policy(config: AttentionConfig, model: ModelConfig, block_length: int) -> AttentionPolicy:
    """A fresh policy for one generation.

    Raises
    ------
    OptionError
        When `config.method` names none, or the method does not go with another option.
    """
    if config.method not in POLICIES:
        raise OptionError(f"attention must be one of {', '.join(POLICIES)}, not {config.method!r}")
    return POLICIES[config.method](config, model, block_length)
