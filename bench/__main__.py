"""python -m bench: measure an operator or a model, compare with another commit, draw what was measured."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

USAGE = """\
usage: python -m bench COMMAND ...

  list                      operators, their methods on each device, named shapes
  run --op NAME [...]       measure one of them; `run --op NAME --help` lists its options
  run --op NAME --base REV  compare our methods with another commit, checkout or installed folder
  fit --model PATH          compare generated keys and queries with a model's own, or fit them to it
  codes --model PATH        compare what top-p keeps by 4-bit codes of keys in different forms
  plot ROWS.jsonl ... -o D  draw what the rows suffice for
  tables [--check]          write the tables of README and docs from result files

examples:
  python -m bench run --op decode_attention --shapes 1:32k:32/8 --dtype bf16
  python -m bench run --op decode_attention --shapes tiny --base HEAD~1
  python -m bench run --op decode_attention --device cuda --json rows.jsonl
  python -m bench run --op prune_top_p --shapes 1:8k:32/8 --budgets quest:2048
  python -m bench run --op llama --device cuda --shapes 1:32k max:32k --json llama.jsonl
"""


def listing() -> None:
    from rich.console import Console
    from rich.table import Table

    from . import registry
    from .run import DEVICES, parse

    console = Console()
    for name in registry.NAMES:
        try:
            op = registry.find(name)
        except ImportError as error:
            console.print(f"[bold]{name}[/]: cannot be measured here, {error}\n")
            continue
        console.print(f"[bold]{name}[/]: {op.about.splitlines()[0]}", highlight=False)
        device = "cpu" if "cpu" in op.devices else "cuda"
        options = parse(op, ["--device", device]) if device == "cpu" or not op.needs_device else None
        for device in (device for device in DEVICES if device in op.devices):
            found = [entry for entry in op.entries(options) if device in entry.devices]
            names = [entry.name + (f" ({why})" if (why := entry.missing()) else "") for entry in found]
            console.print(f"  {device}, {op.default_shapes(device)}: {', '.join(names)}", highlight=False, soft_wrap=True)
    shapes = Table("shapes", "batch:length:heads", title="Named shapes", title_justify="left")
    for name, cells in registry.GRIDS.items():
        shown = ", ".join(f"{b}:{n // 1024}k:{heads}" if n % 1024 == 0 else f"{b}:{n}:{heads}" for b, n, heads in cells[:8])
        shapes.add_row(name, shown + (f", ... ({len(cells)})" if len(cells) > 8 else ""))
    console.print(shapes)


def run(arguments: Sequence[str]) -> int:
    from . import base, registry
    from . import run as runner

    first = argparse.ArgumentParser(prog="python -m bench run", add_help=False)
    first.add_argument("--op", choices=registry.NAMES, required=True)
    op = registry.find(first.parse_known_args(arguments)[0].op)
    options = runner.parse(op, arguments)
    return runner.main(op, options) if options.base is None else base.main(op, options, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 where something could not be measured or drawn, 2 for a malformed command, 3 where the device was lost."""
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if command in ("-h", "--help") or (
        command == "run" and not any(argument.startswith("--op") for argument in rest) and {"-h", "--help"} & set(rest)
    ):
        print(USAGE, end="")
    elif command == "list":
        listing()
    elif command == "run":
        return run(rest)
    elif command == "fit":
        from . import fit

        return fit.main(rest)
    elif command == "codes":
        from . import codes

        return codes.main(rest)
    elif command == "tables":
        from . import tables

        return tables.main(rest)
    elif command == "plot":
        from . import plots

        return plots.main(rest)
    elif command == "worker":  # one side of `run --base`
        from . import base

        return base.worker()
    else:
        print(f"{USAGE}\npython -m bench: expected list, run, fit, codes, plot or tables, got {command}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
