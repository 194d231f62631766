"""``python -m benchmarks``: a run with all peers that are installed, into files."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

import mpchannel
from mpchannel.bench import channels, chart
from mpchannel.bench.figures import BenchError, surroundings
from mpchannel.bench.kinds import KINDS

from .peers import present
from .report import markdown


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 if a run failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure mpchannel, multiprocessing.Pipe and all peers that are installed, in one run.",
    )
    parser.add_argument("--quick", action="store_true", help="1 round of a fifth of the messages: less than a minute")
    parser.add_argument("--rounds", metavar="N", type=int, help="how often each scenario runs (default: 5)")
    parser.add_argument("--scale", metavar="X", type=float, help="messages per run, as a factor (default: 1.0)")
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, default=Path(__file__).parent / "results", help="default: %(default)s"
    )
    options = parser.parse_args(arguments)
    rounds = options.rounds if options.rounds is not None else 1 if options.quick else 5
    scale = options.scale if options.scale is not None else 0.2 if options.quick else 1.0
    try:
        if rounds < 1 or not 0 < scale < float("inf"):
            raise BenchError("--rounds must be at least 1, and --scale more than 0")
        options.out.mkdir(parents=True, exist_ok=True)
        about = surroundings(rounds, scale) | {
            "mpchannel": mpchannel.__version__,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
        channels.print_about(about)
        rows, about["same_loop_ms"] = channels.measure(rounds, scale, (*KINDS, *present()))
        channels.print_figures(rows, about["same_loop_ms"])
        (options.out / "figures.json").write_text(json.dumps({**about, "scenarios": rows}, indent=1) + "\n")
        (options.out / "table.md").write_text(markdown(about, rows))
        written = ["figures.json", "table.md"]
        if chart.has_matplotlib():
            chart.draw(about, rows, str(options.out / "chart.svg"))
            written.append("chart.svg")
        else:
            print("no chart: Matplotlib is not installed")
        print(f"{options.out}: {', '.join(written)}")
    except (BenchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
