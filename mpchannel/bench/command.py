"""The options of ``python -m mpchannel bench``, and what is wrong with them."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from typing import Any

from ..channel import MessageChannel
from . import channels, chart, pools
from .figures import BenchError, surroundings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure channels and multiprocessing.Pipe side by side, in alternating order; or, with --pools, WorkerPool "
        "and other pools of processes."
    )
    parser.add_argument("--pools", action="store_true", help="measure pools")
    parser.add_argument(
        "--start-method",
        choices=multiprocessing.get_all_start_methods(),
        help="how the pools start their workers (default: spawn)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="2 rounds of a fifth of the messages or calls: less than a minute"
    )
    parser.add_argument("--rounds", metavar="N", type=int, help="how often each scenario runs (default: 5)")
    parser.add_argument(
        "--scale", metavar="X", type=float, help="messages or calls per run, as a factor (default: 1.0)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures of each run into FILE as well")
    parser.add_argument(
        "--chart", metavar="FILE", help="draw them into FILE as well, a .png or .svg (of channels; needs Matplotlib)"
    )


def run(options: argparse.Namespace) -> int:
    """Measure and print. Returns the exit code: 0, or 1 if a run failed."""
    rounds = options.rounds if options.rounds is not None else 2 if options.quick else 5
    scale = options.scale if options.scale is not None else 0.2 if options.quick else 1.0
    try:
        if rounds < 1 or not 0 < scale < float("inf"):
            raise BenchError("--rounds must be at least 1, and --scale more than 0")
        if options.start_method and not options.pools:
            raise BenchError("--start-method is of use with --pools only")
        if options.chart and options.pools:
            raise BenchError("--chart is for channels, not for --pools")
        if options.chart:
            chart.check(options.chart)
        for file_name in filter(None, (options.json, options.chart)):
            open(file_name, "a").close()  # better now than after the run
        with MessageChannel():
            pass  # raises on a system that cannot have channels
        about = surroundings(rounds, scale)
        rows: list[dict[str, Any]]
        if options.pools:
            about |= pools.surroundings(options.start_method or "spawn")
            pools.print_about(about)
            rows = pools.measure(rounds, scale, about["start_method"])
            pools.print_figures(rows)
        else:
            channels.print_about(about)
            rows, about["same_loop_ms"] = channels.measure(rounds, scale)
            channels.print_figures(rows, about["same_loop_ms"])
            if options.chart:
                chart.draw(about, rows, options.chart)
        if options.json:
            with open(options.json, "w") as file:
                json.dump({**about, "scenarios": rows}, file, indent=1)
    except BrokenPipeError:
        raise  # nobody reads what we print
    except (BenchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
