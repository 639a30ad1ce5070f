"""Measuring: times of passes, footprint, what a checkpoint takes."""
