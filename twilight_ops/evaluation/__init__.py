"""Accuracy of every selector, with and without the pruner, on a real model: `python -m twilight_ops eval`."""
