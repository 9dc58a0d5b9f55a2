"""`twilight {info,generate,chat,calibrate,demo,...}`, or `python -m twilight_ops ...`: one file a command in `cli/`."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.metadata
import pkgutil
import re
import sys
from pathlib import Path

from . import __version__, cli

SCRIPT = "twilight"
EXAMPLES = {
    "info": "what serves each operator on this machine",
    "generate --random-tiny --prompt hello": "needs no model",
    "generate --model PATH --prompt-file F --question Q": "PATH: a folder, a Hub id or a .gguf file",
    "chat --model PATH --prompt-file F": "a conversation about a long document",
    "calibrate --model PATH --text F --out FILE": "once a model: for vLLM, and for batches",
    "eval --model PATH --out OUT --lengths 8192": "accuracy beside dense attention",
}


class _Help(argparse.RawDescriptionHelpFormatter):
    """Wraps sentences, and leaves what has lines of its own."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        wraps = argparse.HelpFormatter if "\n" not in text else argparse.RawDescriptionHelpFormatter
        return wraps._fill_text(self, text, width, indent)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line, where argparse would print its usage first."""
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        sys.exit(2)


def _declared_help(path: Path) -> str | None:
    """The HELP of a command's file, read without importing it; None where the file is no command."""
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and [getattr(target, "id", None) for target in statement.targets] == ["HELP"]:
            return ast.literal_eval(statement.value)
    return None


def commands() -> dict[str, str]:
    """Names of the commands and their help: files of `cli` with HELP, add_arguments(parser) and run(args)."""
    folder = Path(cli.__path__[0])
    found = {name.replace("_", "-"): _declared_help(folder / f"{name}.py") for _, name, _ in pkgutil.iter_modules(cli.__path__)}
    return {name: text for name, text in found.items() if text is not None}


def _load(command: str):
    return importlib.import_module(f"{cli.__name__}.{command.replace('-', '_')}")


def _program() -> str:
    """What the user typed: the console script, or the module."""
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else "python -m twilight_ops"


def _hint(error: Exception) -> str:
    """How to install what a failed import asks for, where an extra of this package has it."""
    missing = getattr(error, "name", None)
    if not isinstance(error, ModuleNotFoundError) or not missing:
        return ""
    try:
        requirements = importlib.metadata.requires("twilight_ops") or []
    except importlib.metadata.PackageNotFoundError:
        return ""
    for requirement in requirements:
        if found := re.match(rf"""{re.escape(missing.split(".")[0])}\b.*extra == ["'](\w+)["']""", requirement):
            return f" (pip install 'twilight_ops[{found[1]}]')"
    return ""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    program = _program()
    parser = _Parser(
        prog=program,
        description="Select-then-Prune sparse attention for decoding.",
        epilog="\n".join(["examples:", *(f"  {program} {example}\n      {what}" for example, what in EXAMPLES.items())]),
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"twilight_ops {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    available = commands()
    # Only the command that is asked for is imported: the others may need what is not installed.
    chosen = next((argument for argument in arguments if argument in available), None)
    args = None
    try:
        for name, text in available.items():
            command = subparsers.add_parser(name, help=text, formatter_class=_Help)
            if name == chosen:
                _load(name).add_arguments(command)
        args = parser.parse_args(arguments)
        return _load(args.command).run(args)
    except (ValueError, ImportError, OSError) as error:
        # What the user can put right is one line; anything else is a bug and keeps its traceback.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"{program} {chosen}: error: {lines[0]}{_hint(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # Before the arguments are read nothing has run, and the command may not even be imported.
        how = None if args is None else getattr(_load(args.command), "how_to_go_on", None)
        print(f"\n{program} {chosen}: interrupted; {'nothing was written' if how is None else how(args)}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
