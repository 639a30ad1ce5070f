"""Turns a model that predicts the next token into one that fills in blocks: `python -m training.adapt`."""
