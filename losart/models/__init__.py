"""Transformers, put together from parts."""
