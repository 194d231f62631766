"""The options of ``python -m mpchannel demo``, and what is wrong with them."""

from __future__ import annotations

import argparse
import os
import re
import sys
import sysconfig

from . import channel, frames, offload, stream, worker, worlds
from .search import text_files

DESCRIPTION = """\
channel  a worker makes a channel, and hands one of its ports to main
worker   an app process asks a worker process for searches; the worker streams
         what it finds to a reply port of each request (this is the default)
stream   many reply streams at once; one of two workers is killed half way, a
         fresh one takes over, and the result is compared with a plain search
worlds   main hands a port to code it shares nothing with, through a preload
         function and the window of a worker
offload  a pool of workers digests the files of a folder, with a bar for each
         call; a worker is killed half way, its call is done again by a fresh
         one, and the result is compared with what one process finds
frames   1080p video passes through three processes without being copied: made,
         filtered, checked; frames/s, page faults and memory go into a plot
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = DESCRIPTION
    parser.add_argument(
        "name",
        nargs="?",
        choices=("channel", "worker", "stream", "worlds", "offload", "frames"),
        default="worker",
        help="which",
    )
    parser.add_argument(
        "--path",
        metavar="DIR",
        default=sysconfig.get_paths()["stdlib"],
        help="the folder whose text files are searched, or, by offload, all files digested "
        "(default: Python's own standard library)",
    )
    parser.add_argument(
        "--pattern",
        metavar="REGEX",
        action="append",
        help="what to search for; worker: may be given several times, one request each",
    )
    parser.add_argument("--streams", metavar="N", type=int, default=24, help="stream: how many streams (default: 24)")
    parser.add_argument("--workers", metavar="N", type=int, default=2, help="offload: how many workers (default: 2)")
    parser.add_argument(
        "--frames",
        metavar="N",
        type=int,
        default=frames.FRAMES,
        help=f"frames: how many frames (default: {frames.FRAMES:,})",
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        default=frames.PLOT,
        help=f"frames: the picture to write, PNG, SVG or PDF (default: {frames.PLOT})",
    )
    parser.add_argument(
        "--start-method",
        choices=("fork", "spawn", "forkserver"),
        help="how processes are started (default: multiprocessing's default)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the demo. Returns the exit code: 0 if everything came out right, else 1."""
    if options.name == "channel":
        return channel.run(options.start_method)
    if options.name == "worlds":
        return worlds.run(options.start_method)
    problem = problem_of(options)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    if options.name == "frames":
        return frames.run(options.frames, options.plot, options.start_method)
    if options.name == "offload":
        return offload.run(options.path, options.workers, options.start_method)
    if options.name == "worker":
        return worker.run(options.path, options.pattern or worker.PATTERNS, options.start_method)
    pattern = options.pattern[0] if options.pattern else stream.PATTERN
    return stream.run(list(text_files(options.path)), pattern, options.streams, options.start_method)


def problem_of(options: argparse.Namespace) -> str | None:
    if options.name == "frames":
        return frames.problem_of(options.frames, options.plot)
    if not os.path.isdir(options.path):
        return f"not a folder: {options.path}"
    if options.name == "offload":
        if not any(offload.all_files(options.path)):
            return f"no files in {options.path}"
        return None if options.workers >= 1 else f"--workers must be at least 1, not {options.workers}"
    if not any(text_files(options.path)):
        return f"no text files in {options.path}"
    for pattern in options.pattern or ():
        try:
            re.compile(pattern)
        except re.error as error:
            return f"not a regular expression: {pattern!r}: {error}"
    if options.name == "stream" and len(options.pattern or ()) > 1:
        return "demo stream takes one --pattern"
    if options.streams < 1:
        return f"--streams must be at least 1, not {options.streams}"
    return None
