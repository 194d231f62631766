"""``demo offload``: the files of a folder are digested by a ``WorkerPool``; one worker is killed half way.

    main    makes calls of about equal bytes, draws a bar for each that runs, and kills the worker of one of them
    worker  SHA-256 and the compressed size of each file of its call; reports between pieces how far it is
    pool    gives the call of the dead worker to a fresh one, because of ``retries``

What was heard on the delivery thread goes through a queue: all that main knows, and all it prints, is of one thread.
"""

from __future__ import annotations

import hashlib
import os
import queue
import signal
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import mpchannel

from .progress import ProgressLine, bar
from .search import SKIPPED_FOLDERS
from .table import print_table

PIECE = 64 * 1024  # bytes between two reports
CALLS = 6  # for each worker
SMALLEST = 2_000_000  # bytes of a call: some 0.1 s, so that one can be met at work
MOST = 400_000_000  # bytes that are taken of a folder
LEAST = 4_000_000  # bytes; on fewer nobody is killed
RETRIES = 2  # one for the kill; and one more, should a kill come so late that it meets a call that is just being given
SAMPLE = 10  # of every so many files the compressed size is checked as well


class File(NamedTuple):
    path: str
    size: int


class Digest(NamedTuple):
    sha256: str
    size: int
    packed: int  # the compressed size


class Outcome(NamedTuple):
    """From a worker to main: what became of a call. ``None`` for a file that could not be read any more."""

    pid: int
    seconds: float
    digests: list[Digest | None]


# In a worker


def work(paths: Sequence[str], total: int) -> Outcome:
    start, pid = time.perf_counter(), os.getpid()
    digests: list[Digest | None] = []
    before = 0
    for path in paths:
        tell(f"{pid} {path}", total, before)
        found = digest(path, partial(tell, f"{pid} {path}", total, before))
        digests.append(found)
        before += found.size if found else 0
    return Outcome(pid, time.perf_counter() - start, digests)


def tell(text: str, total: int, before: int, done: int = 0) -> None:
    mpchannel.report(before + done, total, text)
    if mpchannel.cancelled():
        raise CancelledError


def digest(path: str, tell: Callable[[int], Any]) -> Digest | None:
    """Calls *tell* after each piece with the bytes read so far."""
    sha, packer = hashlib.sha256(), zlib.compressobj()
    size = packed = 0
    try:
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                sha.update(piece)
                packed += len(packer.compress(piece))
                size += len(piece)
                tell(size)
    except OSError:
        return None
    return Digest(sha.hexdigest(), size, packed + len(packer.flush()))


# In main


@dataclass
class Call:
    """A call, as main sees it."""

    number: int
    files: list[File]
    size: int  # bytes
    done: int = 0
    file: str = ""  # the one it is at
    pids: list[int] = field(default_factory=list)  # of the workers that were at it
    outcome: Outcome | None = None
    error: BaseException | None = None

    @property
    def over(self) -> bool:
        return self.outcome is not None or self.error is not None


class Kill(NamedTuple):
    pid: int
    call: Call
    done: int  # bytes that are lost, and have to be done again
    share: float  # of the bytes of all calls that were done


class Main:
    """The main process: all calls, and the one kill."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.size = sum(call.size for call in calls)
        self.events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.line = ProgressLine()
        self.start = time.perf_counter()
        self.kill: Kill | None = None
        self.redone = False  # another worker has begun with the call of the one that was killed

    def follow_all(self, workers: int, start_method: str | None) -> None:
        futures = []
        with mpchannel.WorkerPool(workers, context=start_method, name="offload") as pool:
            try:
                for call in self.calls:
                    options = pool.options(retries=RETRIES, on_progress=partial(self.on_progress, call))
                    futures.append(options.submit(work, [file.path for file in call.files], call.size))
                    futures[-1].add_done_callback(partial(self.on_done, call))
                while not all(call.over for call in self.calls):
                    self.events.get()()
                    self.kill_one()
                    self.show_progress()
            finally:
                for future in futures:
                    future.cancel()  # they are done, unless we leave early: with Ctrl-C
        self.line.clear()

    def on_progress(self, call: Call, done: float, total: float | None, text: str) -> None:
        self.events.put(partial(self.reported, call, int(done), text))

    def on_done(self, call: Call, future: Future[Outcome]) -> None:
        if not future.cancelled():
            self.events.put(partial(self.ended, call, future))

    def reported(self, call: Call, done: int, text: str) -> None:
        pid, _, call.file = text.partition(" ")
        call.done = done
        if int(pid) not in call.pids:
            call.pids.append(int(pid))
            if self.kill is not None and self.kill.call is call:
                self.redone = True
                self.line.tell(f"call {call.number} is begun again by process {pid}")

    def ended(self, call: Call, future: Future[Outcome]) -> None:
        call.done, call.error = call.size, future.exception()
        if call.error is None:
            call.outcome = future.result()
            if self.kill is not None and self.kill.pid == call.outcome.pid and self.kill.call is call:
                self.kill = None  # its answer was on the way already; so the next one
                self.line.tell(f"call {call.number} was answered before")

    @property
    def done(self) -> int:
        return sum(call.done for call in self.calls)

    def kill_one(self) -> None:
        """Half way: the worker that has the most left to do."""
        if self.kill is not None or self.done * 2 < self.size or self.size < LEAST:
            return
        running = [call for call in self.calls if call.pids and call.done < call.size]
        if running:
            call = max(running, key=lambda call: call.size - call.done)
            pid = call.pids[-1]
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                return  # somebody else did; the next one, then
            self.kill = Kill(pid, call, call.done, self.done / self.size)
            self.line.tell(f"killed process {pid} (SIGKILL), which was at call {call.number}")

    def show_progress(self) -> None:
        if self.line.due:
            running = [call for call in self.calls if call.pids and not call.over]
            seconds = time.perf_counter() - self.start
            text = f"{sum(call.over for call in self.calls)} of {len(self.calls)} calls done, "
            text += f"{self.done / 1e6:,.1f} of {self.size / 1e6:,.1f} MB, {self.done / 1e6 / seconds:,.0f} MB/s"
            bars = [f"{bar(call.done, call.size)}  call {call.number}, {self.who(call)}" for call in running]
            self.line.show(*bars, f"{bar(self.done, self.size)}  {text}")

    def who(self, call: Call) -> str:
        if self.kill is not None and self.kill.call is call and not self.redone:
            return "waits for a new worker"
        return f"process {call.pids[-1]}: {os.path.basename(call.file)}"


def run(folder: str, workers: int, start_method: str | None) -> int:
    """Returns 0 if all digests are right although a worker was killed, and its call done again."""
    files, left = take(folder)
    size = sum(file.size for file in files)
    calls = make_calls(files, workers * CALLS)
    print(f"{folder}: {len(files):,} files, {size / 1e6:,.1f} MB, main process {os.getpid()}")
    if left:
        print(f"{left:,} more files are left out, as they would make it more than {MOST / 1e6:,.0f} MB")
    print(f"{len(calls)} calls for {workers} workers: SHA-256 and the size as zlib compresses it", flush=True)
    main = Main(calls)
    main.follow_all(workers, start_method)
    seconds = time.perf_counter() - main.start
    wrong = check(calls, main)
    print_calls(calls, seconds)
    return 0 if print_end(main, wrong) else 1


def take(folder: str) -> tuple[list[File], int]:
    """The files that are digested, and how many are not because there would be more than ``MOST`` bytes."""
    files: list[File] = []
    left = size = 0
    for file in all_files(folder):
        if size + file.size > MOST:
            left += 1
        else:
            size += file.size
            files.append(file)
    return files, left


def all_files(folder: str) -> Iterator[File]:
    """The regular files below *folder* that can be read, always in the same order; no symbolic links. Hidden folders
    and ``SKIPPED_FOLDERS`` are left out.
    """
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if each not in SKIPPED_FOLDERS and not each.startswith("."))
        for name in sorted(names):
            path = os.path.join(here, name)
            try:
                found = os.lstat(path)
            except OSError:
                continue
            if stat.S_ISREG(found.st_mode) and os.access(path, os.R_OK):
                yield File(path, found.st_size)


def make_calls(files: Sequence[File], count: int) -> list[Call]:
    """About *count* of about equal bytes, or fewer, each of files that are next to each other."""
    most = max(SMALLEST, sum(file.size for file in files) // count)
    calls: list[Call] = []
    for file in files:
        if not calls or calls[-1].size + file.size > most:
            calls.append(Call(len(calls) + 1, [], 0))
        calls[-1].files.append(file)
        calls[-1].size += file.size
    return calls


def check(calls: Sequence[Call], main: Main) -> list[str]:
    """What is wrong, found out without any worker: SHA-256 of all files; the compressed size of one in ``SAMPLE``, and
    of all files of the call that was done again.
    """
    wrong = [f"call {call.number} failed: {call.error}" for call in calls if call.error is not None]
    hashed = packed = size = 0
    for call in calls:
        again = main.kill is not None and main.kill.call is call
        for file, found in zip(call.files, call.outcome.digests if call.outcome else (), strict=False):
            main.line.show(f"checking: {bar(size, main.size)}  {os.path.basename(file.path)}")
            size += file.size
            if again or hashed % SAMPLE == 0:
                right = found == digest(file.path, lambda _: None)
                packed += 1
            else:
                right = (found and found.sha256) == sha256(file.path)
            hashed += 1
            if not right:
                wrong.append(f"{file.path}: not what is found here")
    main.line.clear()
    print(f"checked here, in one process: SHA-256 of {hashed:,} files, the compressed size of {packed:,}")
    return wrong


def sha256(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def print_calls(calls: Sequence[Call], seconds: float) -> None:
    ended = [(call, call.outcome) for call in calls if call.outcome is not None]
    everything = [found for _, outcome in ended for found in outcome.digests]
    rows = []
    for call, outcome in ended:
        figures = cells(outcome.digests, outcome.seconds)
        rows.append([f"{call.number} {span(call.files)}", *figures, str(outcome.pid), str(len(call.pids))])
    total = ["total", *cells(everything, seconds), "", str(sum(len(call.pids) for call in calls))]
    print()
    print_table(("call", "files", "MB", "to", "MB/s", "by process", "attempts"), rows, total)
    print("to: the compressed size. MB/s: of the last attempt (total: of all workers together). MB: 1,000,000 bytes")
    print()


def cells(digests: Sequence[Digest | None], seconds: float) -> list[str]:
    found = [each for each in digests if each is not None]
    size, packed = sum(each.size for each in found), sum(each.packed for each in found)
    return [
        f"{len(found):,}",
        f"{size / 1e6:,.1f}",
        f"{packed / size:.0%}" if size else "-",
        f"{size / 1e6 / seconds:,.1f}" if seconds else "-",
    ]


def span(files: Sequence[File]) -> str:
    """What a call's files are called."""
    first, last = (os.path.basename(files[place].path) for place in (0, -1))
    return first if len(files) == 1 else f"{first} to {last}"


def print_end(main: Main, wrong: Sequence[str]) -> bool:
    """Whether all is as it should be."""
    pids = sorted({pid for call in main.calls for pid in call.pids})
    print(f"workers that ran: {len(pids)}, processes {', '.join(map(str, pids))}")
    if main.kill is not None and main.redone:
        pid, call, done, share = main.kill
        lost = f"{done / 1e6:,.1f} of {call.size / 1e6:,.1f} MB of call {call.number}"
        print(f"killed: process {pid}, when {share:.0%} of all bytes were done, and {lost}")
        print(f"redone: call {call.number}, by process {call.pids[-1]}")
    elif main.size < LEAST:
        print(f"nobody was killed: with less than {LEAST / 1e6:,.0f} MB there is no half way to speak of")
    else:
        print("NO worker was killed while it had a call")
    for each in wrong:
        print(f"WRONG: {each}")
    print(f"result right: {not wrong}")
    return not wrong and (main.redone or main.size < LEAST)
