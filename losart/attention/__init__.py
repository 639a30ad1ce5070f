"""Attention policies, one file each, and their registry."""

from losart.attention.dense import DensePolicy
from losart.attention.losa import LosaPolicy
from losart.attention.policy import POLICIES, AttentionPolicy, make_policy
from losart.attention.quest import QuestPolicy
from losart.attention.sparsed import SparsedPolicy

POLICIES.update(dense=DensePolicy, losa=LosaPolicy, quest=QuestPolicy, sparsed=SparsedPolicy)

__all__ = [
    "POLICIES",
    "AttentionPolicy",
    "DensePolicy",
    "LosaPolicy",
    "QuestPolicy",
    "SparsedPolicy",
    "make_policy",
]
