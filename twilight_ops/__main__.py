"""`python -m twilight_ops {info,generate,calibrate,demo,...}`: one file a command in `cli/`."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys

from . import cli


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line, where argparse would print its usage first."""
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def commands() -> dict:
    """Modules of `cli` that are commands: they have HELP, add_arguments(parser) and run(args)."""
    modules = {name: importlib.import_module(f"{cli.__name__}.{name}") for _, name, _ in pkgutil.iter_modules(cli.__path__)}
    return {name.replace("_", "-"): module for name, module in modules.items() if hasattr(module, "run")}


def main(arguments: list[str] | None = None) -> int:
    parser = _Parser(prog="python -m twilight_ops", description="Select-then-Prune sparse attention for decoding.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    available = commands()
    for name, module in available.items():
        module.add_arguments(subparsers.add_parser(name, help=module.HELP))
    args = parser.parse_args(arguments)
    try:
        return available[args.command].run(args)
    except (ValueError, ImportError, OSError) as error:
        # What the user can put right is one line; anything else is a bug and keeps its traceback.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"python -m twilight_ops {args.command}: error: {lines[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
