"""The command line: ``python -m mpchannel``. Each command's options are in its own room."""

from __future__ import annotations

import argparse
import io
import os
import sys

import mpchannel

from . import doctor
from .bench import command as bench
from .demo import command as demo
from .look import top, trace


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 success, 1 failure, 2 wrong usage, 130 Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may hold what the terminal cannot show
    parser = argparse.ArgumentParser(
        prog="python -m mpchannel", description=(mpchannel.__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--version", action="version", version=f"mpchannel {mpchannel.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, room, summary in (
        ("demo", demo, "channels at work: searches files with a worker process"),
        ("bench", bench, "measure channels and multiprocessing.Pipe side by side, or pools"),
        ("top", top, "show who holds which end, and what waits where, of a running program"),
        ("trace", trace, "tell what a trace says, and draw it"),
        ("doctor", doctor, "does this machine have what channels need? What is missing, with a remedy"),
    ):
        command = commands.add_parser(name, help=summary)
        room.add_arguments(command)
        command.set_defaults(run=room.run)
    try:
        options = parser.parse_args(arguments)
        code: int = options.run(options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except NotImplementedError as error:  # a system that cannot have channels
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Nobody reads on (`| head`). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
