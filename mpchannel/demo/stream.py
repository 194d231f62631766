"""``demo stream``: many replies at the same time, one of the two workers is killed, and nothing is lost.

Each search of a part of the files is a stream of its own, on a port of its own. When a worker is killed, the streams it
had not finished get a close event with reason "died". They are asked for again, of a fresh worker.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import mpchannel

from .children import Children
from .progress import ProgressLine
from .search import Found, Progress, search
from .table import print_table

PATTERN = r"^\s*(class|def) \w+"
ATTEMPTS = 5  # per stream: workers that keep dying must not keep us for ever


class Request(NamedTuple):
    """From main to a worker."""

    pattern: str
    files: Sequence[str]
    reply: mpchannel.MessagePort[Found | Progress, None]


def work(requests: mpchannel.MessagePort[None, Request]) -> None:
    """A worker process: answer all requests at the same time, each on its own port."""
    for request in requests:
        threading.Thread(target=answer, args=(request,)).start()


def answer(request: Request) -> None:
    with request.reply as reply:
        for message in search(request.pattern, request.files):
            if not reply.post_message(message):
                break  # nobody is there to read it
            if isinstance(message, Progress):
                reply.drain()  # never more than one file ahead of the reader


@dataclass
class Worker:
    """A worker process, as main sees it."""

    process: BaseProcess
    requests: mpchannel.MessagePort[Request, None]
    matches: int = 0
    closes: Counter[str] = field(default_factory=Counter)  # reasons of the close events of its streams
    successor: Worker | None = None


@dataclass
class Stream:
    """The search of one part of the files."""

    files: Sequence[str]
    expected: int  # what a plain search finds
    matches: int = 0
    attempts: int = 0
    completed: bool = False


class Main:
    """The main process: all streams, all workers, on one asyncio loop."""

    def __init__(self, pattern: str, streams: Sequence[Stream], context: Any, children: Children) -> None:
        self.pattern = pattern
        self.streams = streams
        self.context = context
        self.children = children
        self.workers: list[Worker] = []
        self.line = ProgressLine()
        # Worker 1 gets every other stream, and is killed when half of all it has to find was received: by then it
        # cannot have completed all of them. (With fewer than two matches there is no half way, and nobody is killed.)
        theirs = sum(stream.expected for stream in streams[::2])
        self.kill_at = theirs // 2

    async def follow_all(self) -> None:
        pair = [self.start_worker(), self.start_worker()]
        await asyncio.gather(*(self.follow(stream, pair[place % 2]) for place, stream in enumerate(self.streams)))
        self.line.clear()
        for worker in self.workers:
            worker.requests.close()

    def start_worker(self) -> Worker:
        requests, theirs = mpchannel.MessageChannel()
        process = self.context.Process(target=work, args=(theirs,))
        self.children.start(process)
        self.workers.append(Worker(process, requests))
        self.tell(f"started worker {len(self.workers)}, process {process.pid}")
        return self.workers[-1]

    async def follow(self, stream: Stream, worker: Worker) -> None:
        """Ask for a search and read the reply. If the worker dies meanwhile, ask its successor, from scratch."""
        while not stream.completed and stream.attempts < ATTEMPTS:
            stream.attempts += 1
            stream.matches = 0
            reply, theirs = mpchannel.MessageChannel()
            worker.requests.post_message(Request(self.pattern, stream.files, theirs), transfer=[theirs])
            await asyncio.sleep(0)  # all streams are asked for before a reply is read, and so before a worker is killed
            async for message in reply:
                if isinstance(message, Found):
                    self.count(stream, worker)
                self.show_progress()
            closed = await reply.await_closed()
            assert closed is not None  # it is None only for a port that was closed on this side
            worker.closes[closed.reason] += 1
            if closed.reason == "closed":
                stream.completed = True
            else:
                worker.successor = worker.successor or self.start_worker()
                worker = worker.successor

    def count(self, stream: Stream, worker: Worker) -> None:
        stream.matches += 1
        worker.matches += 1
        if worker is self.workers[0] and worker.matches == self.kill_at:
            assert worker.process.pid is not None
            os.kill(worker.process.pid, signal.SIGKILL)
            self.tell(f"killed worker 1 (SIGKILL) after {worker.matches:,} matches")

    def tell(self, text: str) -> None:
        self.line.clear()
        print(text, flush=True)

    def show_progress(self) -> None:
        if self.line.due:
            done = sum(stream.completed for stream in self.streams)
            again = sum(stream.attempts > 1 for stream in self.streams)
            matches = sum(stream.matches for stream in self.streams)
            self.line.show(f"{done} of {len(self.streams)} streams complete, {again} taken over, {matches:,} matches")


def run(files: Sequence[str], pattern: str, count: int, start_method: str | None) -> int:
    """Returns 0 if the streams found exactly what a plain search finds."""
    print(f"pattern {pattern}, {len(files):,} files, main process {os.getpid()}")
    print("first a plain search, to compare with", flush=True)
    parts = [files[start::count] for start in range(min(count, len(files)))]
    streams = [Stream(part, expected=plain_search(pattern, part)) for part in parts]
    with Children() as children:
        main = Main(pattern, streams, mpchannel.get_context(start_method), children)
        asyncio.run(main.follow_all())
    print_workers(main.workers)
    return 0 if print_streams(streams) else 1


def plain_search(pattern: str, files: Sequence[str]) -> int:
    """How many matches there are: one process, no channel."""
    return sum(isinstance(each, Found) for each in search(pattern, files))


def print_workers(workers: Sequence[Worker]) -> None:
    rows = []
    for place, worker in enumerate(workers, 1):
        process, closes = worker.process, worker.closes
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(closes.items()))
        answered = f"{closes['closed']} of {closes.total()}"
        rows.append(
            [f"worker {place}", str(process.pid), answered, f"{worker.matches:,}", reasons, str(process.exitcode)]
        )
    print()
    print_table(("", "process", "completed", "matches", "close events", "exit code"), rows)


def print_streams(streams: Sequence[Stream]) -> bool:
    """Whether each stream found as many matches as the plain search did in its files."""
    equal = all(stream.completed and stream.matches == stream.expected for stream in streams)
    again = [stream for stream in streams if stream.attempts > 1]
    rows = [
        ("streams", len(streams)),
        ("completed", sum(stream.completed for stream in streams)),
        ("interrupted", len(again)),
        ("taken over and completed", sum(stream.completed for stream in again)),
        ("matches", sum(stream.matches for stream in streams)),
        ("matches of the plain search", sum(stream.expected for stream in streams)),
    ]
    print()
    print_table(("in all", ""), [(name, f"{number:,}") for name, number in rows])
    print(f"equal, stream by stream: {'yes' if equal else 'NO'}")
    return equal
