"""The command line: ``mobilemamba COMMAND``; the commands are in :data:`COMMANDS`.

An error in the user's input is one line on stderr and exit code 2. Any other error shows its traceback.
"""

import io
import os
import sys
from collections.abc import Sequence

import torch

from .. import __version__
from . import classify, convert, detect, erf, evaluate, export, info, plot, quantize, segment, train
from .options import Parser, one_line

__all__ = ["main"]

#: A command is a module with HELP, add_options(parser) and run(args).
COMMANDS = {
    "classify": classify,
    "detect": detect,
    "segment": segment,
    "evaluate": evaluate,
    "train": train,
    "plot": plot,
    "erf": erf,
    "export": export,
    "quantize": quantize,
    "convert": convert,
    "info": info,
}

RESUME = ": --resume continues from the latest stored state"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit code: 0; 1 if some images could not be classified; 2 if the user's input is refused, or a file or the
        output cannot be written; 75 if a signal stopped a training run that can be continued; 130 after Ctrl-C; 141 if
        the reader of the output has gone, as for ``| head``.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may have any bytes
    program, trains = "mobilemamba", False
    try:
        try:
            args = make_parser().parse_args(argv)
            program = f"mobilemamba {args.command}"
            trains = args.command == "train" and not args.show
            if os.environ.get("WORLD_SIZE", "1") != "1":
                program += f" (process {os.environ.get('RANK')})"
            return COMMANDS[args.command].run(args) or 0
        finally:
            if sys.stdout:
                sys.stdout.flush()  # here, where an error still is one line
    except BrokenPipeError:
        discard_output()
        if trains:
            print(f"{program}: stopped: the reader of its output has gone{RESUME}", file=sys.stderr)
        return 141
    except (ValueError, OSError, ImportError, FloatingPointError, NotImplementedError) as error:
        discard_output()
        print(f"{program}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        print(
            f"{program}: error: out of memory: a smaller --batch-size needs less ({one_line(error):.200})",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted{RESUME if trains else ''}", file=sys.stderr)
        return 130


def discard_output() -> None:
    """If stdout cannot be written, drop what is left for it: Python would try again at its end, with a traceback."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_parser() -> Parser:
    parser = Parser(prog="mobilemamba", description="MobileMamba, a lightweight vision backbone.")
    parser.add_argument("--version", action="version", version=f"mobilemamba {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_options(commands.add_parser(name, help=command.HELP, description=command.HELP))
    return parser
