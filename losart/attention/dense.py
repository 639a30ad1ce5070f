"""Dense attention: every pass reads the whole prefix."""

from __future__ import annotations

from losart.attention.policy import AttentionPolicy


class DensePolicy(AttentionPolicy):
    """Reads the whole prefix in every layer and pass."""

    always_dense = True
