"""``WorkerPool`` and other pools of processes, measured side by side in one run.

In each round each pool is started in a fresh process of its own, one after the other, in an order that is rotated from
round to round. The clock runs when all its workers are at work. Then comes each scenario, which is one function and one
line in ``SCENARIOS``; the only thing that it may know of the pools is what ``Kind`` says.

Ratios are of two figures of the same round, so that what else the machine did meanwhile hit both.
"""

from __future__ import annotations

import concurrent.futures
import gc
import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import operator
import os
import platform
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Final, NamedTuple

import mpchannel

from ..context import get_context
from ..demo.children import Children
from ..demo.progress import ProgressLine
from ..demo.table import print_table
from ..workerpool import WorkerPool
from .figures import HIGHER, LOWER, BenchError, has_numpy, print_surroundings, result_of, significant

WORKERS: Final = 2
_WARM_UP_PATIENCE: Final = 30.0  # seconds until all workers are at work


class Kind(NamedTuple):
    """What is measured: how to start it (by the name of a start method), and what its methods are called."""

    name: str
    start: Callable[[str], Any]
    submit: str = "submit"
    result: str = "result"
    packs: bool = False  # whether arguments are given as one tuple
    library: str | None = None  # that has to be installed


def _worker_pool(start_method: str) -> Any:
    return WorkerPool(WORKERS, context=start_method)


def _multiprocessing(start_method: str) -> Any:
    return multiprocessing.get_context(start_method).Pool(WORKERS)


def _concurrent(start_method: str) -> Any:
    context = multiprocessing.get_context(start_method)
    return concurrent.futures.ProcessPoolExecutor(WORKERS, mp_context=context)


def _loky(_: str) -> Any:
    return importlib.import_module("loky").ProcessPoolExecutor(WORKERS)  # has a start method of its own


KINDS: Final = (
    Kind("mpchannel.WorkerPool", _worker_pool),
    Kind("multiprocessing.Pool", _multiprocessing, submit="apply_async", result="get", packs=True),
    Kind("ProcessPoolExecutor", _concurrent),
    Kind("loky", _loky, library="loky"),
)
OURS: Final = KINDS[0].name


def present() -> list[int]:
    """The places in ``KINDS`` of those that are installed."""
    return [
        place
        for place, kind in enumerate(KINDS)
        if kind.library is None or importlib.util.find_spec(kind.library) is not None
    ]


@dataclass
class Side:
    """What a scenario's function is given."""

    kind: Kind
    pool: Any
    times: int
    submit: Callable[..., Any] = field(init=False)
    result: Callable[[Any], Any] = field(init=False)

    def __post_init__(self) -> None:
        self.submit = getattr(self.pool, self.kind.submit)
        self.result = operator.methodcaller(self.kind.result)


# In the workers


def nothing() -> None:
    pass


def same(message: Any) -> Any:
    return message


def who() -> int:
    time.sleep(0.02)  # leave some for the others
    return os.getpid()


# Scenarios


def flood(side: Side) -> float:
    """Calls per second that do nothing: all are submitted, then all results gathered."""
    submit, result = side.submit, side.result
    for count in (side.times // 10 + 1, side.times):  # the first to warm up
        gc.collect()
        start = time.perf_counter()
        calls = [submit(nothing) for _ in range(count)]
        for call in calls:
            result(call)
        seconds = time.perf_counter() - start
        del calls, call
    return side.times / seconds


def one_call(side: Side) -> float:
    """Microseconds of the typical call: one at a time."""
    submit, result = side.submit, side.result
    took = []
    for _ in range(side.times // 10 + 1 + side.times):
        start = time.perf_counter()
        result(submit(nothing))
        took.append(time.perf_counter() - start)
    return statistics.median(took[-side.times :]) * 1e6


def arrays(side: Side) -> float:
    """Calls per second that are given an array and return it: all are submitted, then all results gathered."""
    submit, result = side.submit, side.result
    array = array_1_mib()
    arguments = ((array,),) if side.kind.packs else (array,)
    for count in (2 * WORKERS, side.times):  # the first to warm up
        start = time.perf_counter()
        calls = [submit(same, *arguments) for _ in range(count)]
        results = [result(call) for call in calls]
        seconds = time.perf_counter() - start
        if any(memoryview(each).nbytes != memoryview(array).nbytes for each in results):
            raise ValueError("another array came back")
        del calls, results
    return side.times / seconds


def array_1_mib() -> Any:
    """float64, or without NumPy a bytearray."""
    if not has_numpy():
        return bytearray(1 << 20)
    import numpy

    return numpy.arange((1 << 20) // 8, dtype=numpy.float64)


class Scenario(NamedTuple):
    name: str
    unit: str
    better: str
    times: int  # calls in one run, at scale 1
    run: Callable[[Side], float]


SCENARIOS: Final = (
    Scenario("no-ops", "calls/s", HIGHER, 10_000, flood),
    Scenario("call", "us", LOWER, 2_000, one_call),
    Scenario("1 MiB arrays", "calls/s", HIGHER, 50, arrays),
)


# Running them


def _take_part(place: int, start_method: str, times: Sequence[int], result: Connection) -> None:
    """What the process of a run does: all scenarios with one pool. *place*: in ``KINDS``."""
    os.setpgrp()  # not all pools end their workers when they are terminated
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    kind = KINDS[place]
    with kind.start(start_method) as pool:
        _warm_up(Side(kind, pool, WORKERS))
        result.send([scenario.run(Side(kind, pool, count)) for scenario, count in zip(SCENARIOS, times, strict=True)])


def _warm_up(side: Side) -> None:
    """Return when all workers have begun."""
    seen: set[int] = set()
    deadline = time.monotonic() + _WARM_UP_PATIENCE
    while len(seen) < WORKERS:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(seen)} of {WORKERS} workers have begun in {_WARM_UP_PATIENCE:.0f} s")
        calls = [side.submit(who) for _ in range(WORKERS)]
        seen.update(side.result(call) for call in calls)


def run_once(place: int, start_method: str, times: Sequence[int]) -> list[float]:
    """One run of one pool, in a fresh process: a figure for each scenario."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    result, for_result = multiprocessing.Pipe(duplex=False)
    with Children() as children:
        children.start(context.Process(target=_take_part, args=(place, start_method, times, for_result)))
        for_result.close()
        figures: list[float] = result_of(result)
        return figures


def measure(rounds: int, scale: float, start_method: str) -> list[dict[str, Any]]:
    """All pools in all rounds: one dict per scenario, with a list of figures per pool, and the ratio to each other."""
    line = ProgressLine()
    times = [max(1, round(scenario.times * scale)) for scenario in SCENARIOS]
    places = present()
    rows: list[dict[str, Any]] = [
        {
            "scenario": scenario.name,
            "unit": scenario.unit,
            "better": scenario.better,
            "times": count,
            "figures": {KINDS[place].name: [] for place in places},
        }
        for scenario, count in zip(SCENARIOS, times, strict=True)
    ]
    for number in range(rounds):
        first = number % len(places)
        for place in places[first:] + places[:first]:
            name = KINDS[place].name
            line.show(f"round {number + 1} of {rounds}: {name}")
            try:
                figures = run_once(place, start_method, times)
            except BenchError as error:
                line.clear()
                raise BenchError(f"{name}: {error}") from None
            for row, figure in zip(rows, figures, strict=True):
                row["figures"][name].append(figure)
    line.clear()
    for row in rows:
        row["ratios"] = ratios(row["figures"])
    return rows


def ratios(figures: dict[str, list[float]]) -> dict[str, float]:
    """Our figure divided by that of each other pool in the same round: the median of these."""
    ours = figures[OURS]
    return {
        name: statistics.median(map(operator.truediv, ours, theirs)) for name, theirs in figures.items() if name != OURS
    }


# Showing them


def surroundings(start_method: str) -> dict[str, Any]:
    """What ``figures.surroundings`` does not tell."""
    installed = {kind.library for place, kind in enumerate(KINDS) if kind.library and place in present()}
    if has_numpy():
        installed.add("numpy")
    return {
        "start_method": start_method,
        "workers": WORKERS,
        "versions": {
            "python": platform.python_version(),
            "mpchannel": mpchannel.__version__,
            **{name: importlib.metadata.version(name) for name in sorted(installed)},
        },
        "missing": [kind.name for place, kind in enumerate(KINDS) if place not in present()],
    }


def print_about(about: dict[str, Any]) -> None:
    print_surroundings(about)
    print(f"workers: {about['workers']}, start method: {about['start_method']} (loky has one of its own)")
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items() if name != "python"))
    for name in about["missing"]:
        print(f"{name} is not installed, and not measured")
    if not about["numpy"]:
        print("1 MiB array: a bytearray (NumPy is not installed)")
    print()


def print_figures(rows: Sequence[dict[str, Any]]) -> None:
    """The medians, and how ours compare."""
    heads = ["medians"]
    for row in rows:
        heads += [f"{row['scenario']}{'/s' if row['unit'] == 'calls/s' else ', us'}", "ratio"]
    table = []
    for name in rows[0]["figures"]:
        line = [name]
        for row in rows:
            ratio = row["ratios"].get(name)
            line += [significant(statistics.median(row["figures"][name])), "-" if ratio is None else significant(ratio)]
        table.append(line)
    print_table(heads, table)
    print("no-ops and 1 MiB arrays (there and back): all are submitted, then all gathered.")
    print("call: one at a time. ratio: mpchannel's figure divided by that pool's in the")
    print("same round, the median of these. A higher figure, and so ratio, is the better")
    print("one, but for the time of a call")
