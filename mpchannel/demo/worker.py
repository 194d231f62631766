"""``demo worker``: two processes that talk directly, over a channel that a third one made for them.

    main    starts a worker and an app. When the app asks for a channel to the worker, it makes one, gives an end to
            each, and is not in the way of the data. Somebody else, who asks as well, gets none
    app     asks the worker for searches; sends with each request a port for the reply
    worker  streams what it finds to that port, and closes it at the end

After "Worker process" and "Reply streams" in Electron's guide to MessagePorts.
"""

from __future__ import annotations

import os
import queue
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mpchannel
from mpchannel import ipc

from .progress import ProgressLine
from .search import Found, Progress, search, text_files
from .table import print_table

PATTERNS = (r"TODO|FIXME|XXX", r"^class \w+", r"raise \w*Error", r"^\s*(async )?def \w+", r"\d+\.\d+")

Port = mpchannel.MessagePort[Any, Any]


class Request(NamedTuple):
    """From the app to the worker."""

    pattern: str
    folder: str
    reply: mpchannel.MessagePort[Found | Progress, None]


@dataclass
class Result:
    """From the app to main: what became of a request; ``reason`` and ``pid`` of its close event are there at its end"""

    pattern: str
    files: int = 0
    lines: int = 0
    bytes: int = 0
    matches: int = 0
    messages: int = 0
    seconds: float = 0.0
    first_match: float | None = None  # seconds from the request to the first match
    latest: str = ""  # where the latest match is
    reason: str | None = None
    pid: int | None = None


def work() -> None:
    """The worker process: answer the requests of a client, until it is gone."""
    ipc.parent.once("new-client", serve)


def serve(event: ipc.IpcEvent) -> None:
    (client,) = event.ports
    client.onmessage = lambda event: answer(event.data)  # from now on it is for this port that the worker lives


def answer(request: Request) -> None:
    with request.reply as reply:
        for message in search(request.pattern, text_files(request.folder)):
            if not reply.post_message(message):
                break  # nobody is there to read it


def use(patterns: Sequence[str], folder: str) -> None:
    """The app process: get a port to the worker, ask, and tell main what came of it."""
    provided: queue.SimpleQueue[ipc.IpcEvent] = queue.SimpleQueue()
    ipc.parent.once("provide-worker-channel", provided.put)
    ipc.parent.send("request-worker-channel")
    (worker,) = provided.get().ports
    main = mpchannel.parent_port()
    assert main is not None
    with worker:
        for pattern in patterns:
            ask(worker, pattern, folder, main)


def intrude() -> None:
    """Another process: it would like to talk to the worker as well."""
    ipc.parent.send("request-worker-channel")


def ask(worker: mpchannel.MessagePort[Request, None], pattern: str, folder: str, main: Port) -> None:
    result = Result(pattern)
    latest: Found | None = None
    report_due = start = time.perf_counter()
    reply, theirs = mpchannel.MessageChannel()
    worker.post_message(Request(pattern, folder, theirs), transfer=[theirs])
    for message in reply:
        now = time.perf_counter()
        result.messages += 1
        result.seconds = now - start
        if isinstance(message, Found):
            result.matches += 1
            latest = message
            if result.first_match is None:
                result.first_match = result.seconds
        else:
            result.files, result.lines, result.bytes = message
        if now >= report_due:
            if latest:
                result.latest = f"{os.path.relpath(latest.file, folder)}:{latest.line}"
            if not main.post_message(result):
                return  # main is gone, so nobody wants to know
            report_due = now + 0.1
    closed = reply.wait_closed()
    if closed is not None:
        result.reason, result.pid = closed.reason, closed.pid
    main.post_message(result)


def run(folder: str, patterns: Sequence[str], start_method: str | None) -> int:
    """The main process. Returns 0 if every search was answered to its end."""
    held: list[mpchannel.MessagePort[Any, Any]] = []
    refused: list[int] = []

    def requested(event: ipc.IpcEvent) -> None:
        if event.sender is not app:
            refused.append(event.sender.pid)
            return
        for_app, for_worker = mpchannel.MessageChannel()
        worker.ipc.post_message("new-client", None, [for_worker])
        event.reply("provide-worker-channel", None, [for_app])
        held.extend((for_app, for_worker))

    print(f"searching {folder}")
    with (
        mpchannel.Worker(work, name="worker", context=start_method) as worker,
        mpchannel.Worker(intrude, name="intruder", context=start_method) as intruder,
        mpchannel.Worker(use, patterns, folder, name="app", context=start_method) as app,
    ):
        ipc.main.on("request-worker-channel", requested)  # who asked before now has waited
        print(f"app     process {app.pid}: sends {len(patterns)} requests, each with a port for the reply")
        print(f"worker  process {worker.pid}: answers them, directly to the app")
        results = watch(app)
        for each in (app, worker, intruder):
            each.join()
    ipc.main.off("request-worker-channel", requested)

    ends = sum(not port.detached for port in held)
    print(f"main    process {os.getpid()}: made one channel, and holds {ends} of its {len(held)} ends")
    print(f"other   process {intruder.pid}: asked for one too; refused: {refused == [intruder.pid]}")
    print_results(results)
    closes = [(f"port for the reply to {each.pattern}", each.reason, each.pid) for each in results]
    print_table(("what closed", "reason", "by process"), [[what, str(why), str(who)] for what, why, who in closes])
    print(f"exit codes: app {app.exitcode}, worker {worker.exitcode}")
    answered = [result.reason for result in results] == ["closed"] * len(patterns)
    return 0 if answered and app.exitcode == worker.exitcode == 0 and refused == [intruder.pid] else 1


def watch(app: mpchannel.Worker) -> list[Result]:
    """Show how the app gets on, until it ends. Returns the results."""
    line = ProgressLine()
    results: list[Result] = []
    while True:
        try:
            result = app.recv()
        except mpchannel.PortClosedError:
            break
        line.show(
            f"search {len(results) + 1}: {result.files:,} files, {result.bytes / 1e6:,.1f} MB, "
            f"{result.matches:,} matches; {result.latest}"
        )
        if result.reason:
            results.append(result)
    line.clear()
    return results


def print_results(results: Sequence[Result]) -> None:
    total = Result("total")
    for result in results:
        total.files += result.files
        total.lines += result.lines
        total.bytes += result.bytes
        total.matches += result.matches
        total.messages += result.messages
        total.seconds += result.seconds
    latencies = [result.first_match for result in results if result.first_match is not None]
    total.first_match = statistics.median(latencies) if latencies else None
    print()
    heads = ("search", "files", "lines", "matches", "MB", "MB/s", "first match", "messages")
    print_table(heads, [cells(result) for result in results], cells(total))
    print("first match: time from the request to its arrival at the app (total: median);")
    print("the first search also waits for the worker to start. MB: 1,000,000 bytes")
    print()


def cells(result: Result) -> list[str]:
    megabytes = result.bytes / 1e6
    return [
        result.pattern,
        f"{result.files:,}",
        f"{result.lines:,}",
        f"{result.matches:,}",
        f"{megabytes:,.1f}",
        f"{megabytes / result.seconds:,.1f}" if result.seconds else "-",
        "-" if result.first_match is None else f"{result.first_match * 1e3:.1f} ms",
        f"{result.messages:,}",
    ]
