"""Measuring what attention methods cost in accuracy. Not imported by `losart` itself."""
