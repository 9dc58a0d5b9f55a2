"""Measurements of the operators and of whole models: `python -m bench --help`, from the root of the checkout."""
