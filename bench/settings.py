"""--settings: methods beside those that a bench declares, spelt as `python -m twilight_ops eval` spells them."""

from __future__ import annotations

import argparse

from twilight_ops.evaluation import methods


def add_settings(p: argparse._ArgumentGroup) -> None:
    p.add_argument(
        "--settings",
        nargs="+",
        default=[],
        metavar="NAME:BUDGET:P",
        help="more methods, spelt as for `python -m twilight_ops eval`, e.g. quest:n/4:.95 shadow_prefix:.85",
    )


def parsed_settings(options: argparse.Namespace) -> dict[str, methods.Method]:
    """Of --settings: a selector, its fields and p, by text."""
    try:
        found = {text: methods.parse_method(text, "settings") for text in options.settings}
    except ValueError as error:
        options.error(f"--{error}")
    for text, method in found.items():
        if method.selector is None:
            options.error(f"--settings: expected a selector, got {text}")
    return found
