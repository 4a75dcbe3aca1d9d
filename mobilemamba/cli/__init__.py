"""The command line: ``mobilemamba classify | train | export | convert | info``.

An error in the user's input is one line on stderr and exit code 2. Any other error shows its traceback.
"""

import sys
from collections.abc import Sequence

from .. import __version__
from . import classify, convert, export, info, train
from .options import Parser

__all__ = ["main"]

#: A command is a module with HELP, add_options(parser) and run(args).
COMMANDS = {"classify": classify, "train": train, "export": export, "convert": convert, "info": info}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0, 2 if the user's input is refused, 130 after Ctrl-C.
    """
    args = make_parser().parse_args(argv)
    try:
        COMMANDS[args.command].run(args)
    except (ValueError, OSError, ImportError, FloatingPointError, NotImplementedError) as error:
        print(f"mobilemamba {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        hint = ": --resume continues from the latest epoch" if args.command == "train" else ""
        print(f"\nmobilemamba {args.command}: interrupted{hint}", file=sys.stderr)
        return 130
    return 0


def make_parser() -> Parser:
    parser = Parser(prog="mobilemamba", description="MobileMamba, a lightweight vision backbone.")
    parser.add_argument("--version", action="version", version=f"mobilemamba {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_options(commands.add_parser(name, help=command.HELP, description=command.HELP))
    return parser
