"""What the commands share about their arguments: kinds of values, and files that are checked before long work begins."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from .. import _settings
from .._settings import Check


def _parsed(convert: Callable[[str], Any], check: Check) -> Callable[[str], Any]:
    """An argparse type: what `convert` makes of the text has to pass `check`."""

    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except (ValueError, ZeroDivisionError):
            value = text
        try:
            return check("argument", "value", value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix("argument: value: ")) from None

    return parse


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """An integer >= least."""
    return _parsed(int, _settings.integer(least, most))


def tokens(least: int) -> Callable[[str], int]:
    """A number of tokens; a larger one than any length is everything."""
    return _parsed(int, _settings.tokens(least))


def number(**limits: float) -> Callable[[str], float]:
    """A finite number, as a decimal or a fraction such as 1/4; limits of `_settings.number`."""
    return _parsed(lambda text: float(Fraction(text)), _settings.number(**limits))


def read_text(path: Path, option: str) -> str:
    """A UTF-8 file; ValueError names the option."""
    if not path.is_file():
        raise ValueError(f"{option}: expected a text file, got {path}")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{option}: expected UTF-8 text, got {path} with byte {error.object[error.start]:#04x} at {error.start}") from None


def check_outputs(**paths: Path | None) -> None:
    """Refuses, by option, a file that could not be written later, and one file for two purposes; touches nothing."""
    taken: dict[Path, str] = {}
    for name, path in paths.items():
        option = name.replace("_", "-")
        if path is None:
            continue
        if path.is_dir() or not path.name:
            raise ValueError(f"{option}: expected a file, got the folder {path}")
        if not path.parent.is_dir():
            raise ValueError(f"{option}: expected a file in a folder that exists, got {path}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"{option}: expected a file that can be written, got {path}")
        other = taken.setdefault(path.resolve(), option)
        if other != option:
            raise ValueError(f"{option}: expected another file than that of {other}, got {path}")


def check_output_folder(path: Path, option: str) -> None:
    """Refuses a folder that could neither be used nor made."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"{option}: expected a folder that can be written, got {path}")


def write_json(path: Path, record: dict) -> None:
    """JSON has no NaN and no infinity: where there was nothing to measure stands null."""
    path.write_text(json.dumps(_finite(record), indent=1, allow_nan=False) + "\n", "utf-8")


def write_jsonl(path: Path, rows: Sequence[dict]) -> None:
    """One row a line; see `write_json`."""
    path.write_text("".join(json.dumps(_finite(row), allow_nan=False) + "\n" for row in rows), "utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
