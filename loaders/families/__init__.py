"""Model families, one file each."""

from losart.loaders.families.sdar import SUPPORTED_MODEL_TYPES, family_of

__all__ = ["SUPPORTED_MODEL_TYPES", "family_of"]
