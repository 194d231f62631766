"""One look at a tree of processes: their channels, what waits in them, and who waits for whom.

House rules: everything comes from /proc and the kernel's socket diagnosis; processes may end at any line here, and are
then left out; what is not allowed raises ``PermissionError`` with who may.
"""

from __future__ import annotations

import os
import platform
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from .._sockdiag import UnixSocket, packets, unix_sockets
from .._wire import ANNOUNCEMENT

_MEMORY: Final = "/memfd:mpchannel"
_APPEND: Final = os.O_APPEND
_ASYNC: Final = os.O_ASYNC
_TICKS: Final = os.sysconf("SC_CLK_TCK")
_CALLS: Final = {  # numbers of system calls that wait for a message: poll, ppoll; recvfrom, recvmsg
    "x86_64": ({7, 271}, {45, 47}),
    "aarch64": ({73}, {207, 212}),
}
_POLL: Final = struct.Struct("=ihh")
_POLLED_MOST: Final = 64


@dataclass
class Process:
    pid: int
    parent: int
    name: str
    state: str  # the kernel's letter: R, S, D, T, Z
    age: float  # seconds
    cpu: float  # seconds used
    descriptors: int
    cpu_percent: float | None = None  # since the look before
    waits_for: list[int] = field(default_factory=list)  # pids whose message one of its threads sleeps for
    files: list[dict[str, int]] = field(default_factory=list)  # overflow files that could be of several channels


@dataclass
class Queue:
    """What was posted one way, and not yet taken."""

    bytes: int
    messages: int
    exact: bool  # whether it is just so many messages, or at most
    file: int = 0  # bytes of its overflow file
    rate: float | None = None  # bytes a second that it grew by since the look before

    @property
    def total(self) -> int:
        return self.bytes + self.file


@dataclass
class Channel:
    """Two ends, by the inodes of their sockets; the queues are those of what comes to the first, and the second."""

    inodes: tuple[int, int]
    holders: tuple[list[tuple[int, int]], list[tuple[int, int]]]  # (pid, descriptor) of each copy of an end
    queues: tuple[Queue, Queue]
    lifeline: bool  # nothing is ever sent: its end is the end of a worker
    seen: float = 0.0  # seconds since it was first looked at

    @property
    def pids(self) -> tuple[int | None, int | None]:
        """The process that holds each end: the first, if there are several; ``None`` if it is on its way or gone."""
        one, other = (min((pid for pid, _ in holders), default=None) for holders in self.holders)
        return one, other


@dataclass
class Snapshot:
    root: int
    time: float  # of the monotonic clock
    processes: dict[int, Process]
    channels: list[Channel]
    hints: list[str] = field(default_factory=list)

    def as_data(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "root": self.root,
            "processes": [asdict(each) for each in self.processes.values()],
            "channels": [
                {
                    "lifeline": each.lifeline,
                    "seen": round(each.seen, 3),
                    "ends": [
                        {
                            "inode": inode,
                            "holders": [{"pid": pid, "descriptor": number} for pid, number in holders],
                            "waiting": asdict(queue),
                        }
                        for inode, holders, queue in zip(each.inodes, each.holders, each.queues, strict=True)
                    ],
                }
                for each in self.channels
            ],
            "hints": self.hints,
        }


class Watch:
    """Looks at one tree of processes, again and again."""

    def __init__(self, pid: int) -> None:
        """Raises ``ProcessLookupError`` if there is no such process, ``PermissionError`` if it is somebody else's."""
        self.root = pid
        self._before: Snapshot | None = None
        self._first: dict[tuple[int, int], float] = {}
        _check_allowed(pid)

    def look(self) -> Snapshot:
        """Raises ``ProcessLookupError`` once the process has ended, ``OSError`` where the kernel tells nothing."""
        parents = _parents()
        if self.root not in parents:
            raise ProcessLookupError(f"there is no process {self.root}")
        tree = _tree(self.root, parents)
        found = {pid: process for pid in tree if (process := _process(pid, parents[pid])) is not None}
        now = Snapshot(self.root, time.monotonic(), found, [])
        ends = _Ends(found)
        if self.root not in found or self.root not in ends.readable:
            raise ProcessLookupError(f"process {self.root} has ended")
        now.channels = ends.channels()
        ends.assign_files(now)
        for channel in now.channels:
            channel.seen = now.time - self._first.setdefault(channel.inodes, now.time)
        for process in found.values():
            process.waits_for = sorted(_waits_for(process.pid, ends))
        if self._before is not None:
            _compare(self._before, now)
        now.hints = _hints(now)
        self._before = now
        return now


def _check_allowed(pid: int) -> None:
    try:
        owner = os.stat(f"/proc/{pid}").st_uid
        os.listdir(f"/proc/{pid}/fd")
    except FileNotFoundError:
        raise ProcessLookupError(f"there is no process {pid}") from None
    except PermissionError:
        raise PermissionError(
            f"process {pid} is not yours to look at: only the same user can (it is of user {owner}, you are user "
            f"{os.geteuid()})"
        ) from None


# Processes


def _stat(pid: int) -> tuple[str, list[str]] | None:
    """A process's name, and the numbers behind it in its ``stat``, from the state on."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            before, _, after = file.read().decode(errors="replace").rpartition(")")
    except OSError:
        return None  # it has ended
    return before.partition("(")[2], after.split()


def _parents() -> dict[int, int]:
    """All processes that are there, each with its parent."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (told := _stat(int(name))) is not None:
            found[int(name)] = int(told[1][1])
    return found


def _tree(root: int, parents: dict[int, int]) -> list[int]:
    children = defaultdict(list)
    for pid, parent in parents.items():
        children[parent].append(pid)
    tree = [root]
    for pid in tree:  # grows meanwhile
        tree += sorted(children[pid])
    return tree


def _process(pid: int, parent: int) -> Process | None:
    told = _stat(pid)
    if told is None:
        return None
    name, words = told
    with open("/proc/uptime") as file:
        uptime = float(file.read().split()[0])
    cpu = (int(words[11]) + int(words[12])) / _TICKS
    return Process(pid, parent, _title(pid) or name, words[0], max(0.0, uptime - int(words[19]) / _TICKS), cpu, 0)


def _title(pid: int) -> str:
    """What is run: the script or module, not the path of Python."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return ""
    if "--multiprocessing-fork" in words:
        return "spawned process"
    if any("forkserver import main" in word for word in words):
        return "fork server"
    if any("resource_tracker import main" in word for word in words):
        return "resource tracker"
    if not os.path.basename(words[0]).startswith("python") or len(words) == 1:
        return os.path.basename(words[0])
    if words[1] in ("-c", "-m"):
        return " ".join(" ".join(words[1:3]).split())[:40]
    return os.path.basename(next((word for word in words[1:] if not word.startswith("-")), words[0]))


# Channels


class _Ends:
    """Who holds which socket, and which overflow file."""

    def __init__(self, tree: dict[int, Process]) -> None:
        """Raises ``OSError`` where the kernel does not tell of sockets."""
        self._tree = tree
        self.readable: set[int] = set()
        self.sockets = {key: each for key, each in unix_sockets().items() if each.kind == socket.SOCK_SEQPACKET}
        self.holders: dict[int, list[tuple[int, int]]] = defaultdict(list)
        self.numbers: dict[tuple[int, int], int] = {}  # (pid, descriptor): inode
        self._memory: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for name in os.listdir("/proc"):
            if name.isdigit():
                self._list(int(name))

    def _list(self, pid: int) -> None:
        try:
            numbers = [int(name) for name in os.listdir(f"/proc/{pid}/fd")]
        except OSError:
            return  # it has ended, or is somebody else's
        self.readable.add(pid)
        if pid in self._tree:
            self._tree[pid].descriptors = len(numbers)
        for number in sorted(numbers):
            try:
                target = os.readlink(f"/proc/{pid}/fd/{number}")
                if target.startswith("socket:["):
                    inode = int(target[8:-1])
                    if inode in self.sockets:
                        self.holders[inode].append((pid, number))
                        self.numbers[pid, number] = inode
                elif pid in self._tree and target.startswith(_MEMORY):
                    self._memory[os.stat(f"/proc/{pid}/fd/{number}").st_ino].append((pid, number))
            except OSError:
                continue  # closed meanwhile

    def channels(self) -> list[Channel]:
        """Those that a process of the tree holds an end of."""
        found = {}
        for inode, holders in self.holders.items():
            near = self.sockets[inode]
            if any(pid in self._tree for pid, _ in holders) and near.peer:
                pair = min(inode, near.peer), max(inode, near.peer)
                if pair not in found and (far := self.sockets.get(near.peer)) is not None:
                    found[pair] = self._channel(*((near, far) if inode == pair[0] else (far, near)))
        return [found[pair] for pair in sorted(found)]

    def _channel(self, one: UnixSocket, other: UnixSocket) -> Channel:
        queues = (
            Queue(one.waiting, *packets(one.waiting, other.held)),
            Queue(other.waiting, *packets(other.waiting, one.held)),
        )
        holders = self.holders[one.inode], self.holders[other.inode]
        lifeline = any(_flags(*each) & _ASYNC for each in holders[0] + holders[1])
        return Channel((one.inode, other.inode), holders, queues, lifeline)

    def assign_files(self, now: Snapshot) -> None:
        """Overflow files: to the channel that it must be of, else to the process that writes it."""
        for inode, holders in self._memory.items():
            if not any(_flags(*each) & _APPEND for each in holders):
                continue  # the body of a large message
            try:
                status = os.stat("/proc/{}/fd/{}".format(*holders[0]))
            except OSError:
                continue  # closed meanwhile
            size = min(status.st_size, status.st_blocks * 512)
            if not size:
                continue
            pids = {pid for pid, _ in holders}
            # Its announcement stays in the socket as long as there is something in the file.
            queues = [
                queue
                for channel in now.channels
                for queue, to, by in zip(channel.queues, channel.pids, channel.pids[::-1], strict=True)
                if queue.bytes >= ANNOUNCEMENT.size
                and (({to, by} == pids) if len(pids) > 1 else (by in pids or to in pids))
            ]
            if len(queues) == 1:
                queues[0].file, queues[0].exact = size, False
            else:
                now.processes[min(pids)].files.append({"inode": inode, "bytes": size})


def _flags(pid: int, number: int) -> int:
    """How a descriptor is open."""
    try:
        with open(f"/proc/{pid}/fdinfo/{number}") as file:
            return next((int(line.split()[1], 8) for line in file if line.startswith("flags:")), 0)
    except OSError:
        return 0


# Who waits for whom


def _waits_for(pid: int, ends: _Ends) -> set[int]:
    """Processes whose message a thread of this one sleeps for, with nothing there for it."""
    found: set[int] = set()
    for numbers in _slept_on(pid):
        inodes = [ends.numbers[pid, number] for number in numbers if (pid, number) in ends.numbers]
        if any(ends.sockets[inode].waiting for inode in inodes):
            continue  # it is being woken, or is stopped
        found |= {by for inode in inodes for by, _ in ends.holders[ends.sockets[inode].peer] if by != pid}
    return found


def _slept_on(pid: int) -> Iterator[list[int]]:
    """For each thread that sleeps in a call for messages: the descriptors that it sleeps on. (An event loop or the
    delivery thread, which would do something else as well, sleeps in epoll_wait.)
    """
    polls, receives = _CALLS.get(platform.machine(), (set(), set()))
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/syscall") as file:
                words = file.read().split()
            if len(words) < 3 or not words[0].isdigit():
                continue  # it is running
            call, first, second = int(words[0]), int(words[1], 16), int(words[2], 16)
            if call in receives:
                yield [first]
            elif call in polls and 0 < second <= _POLLED_MOST:
                with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
                    data = os.pread(memory.fileno(), second * _POLL.size, first)
                yield [number for number, _, _ in _POLL.iter_unpack(data[: len(data) // _POLL.size * _POLL.size])]
        except (OSError, ValueError):
            continue  # it has ended; or this system does not let anybody look


def _compare(before: Snapshot, now: Snapshot) -> None:
    seconds = max(1e-6, now.time - before.time)
    for pid, process in now.processes.items():
        earlier = before.processes.get(pid)
        if earlier is not None:
            process.cpu_percent = round(100 * (process.cpu - earlier.cpu) / seconds, 1)
    known = {channel.inodes: channel for channel in before.channels}
    for channel in now.channels:
        old = known.get(channel.inodes)
        for queue, was in zip(channel.queues, old.queues if old is not None else (), strict=False):
            queue.rate = round((queue.total - was.total) / seconds, 1)


def _hints(now: Snapshot) -> list[str]:
    hints = []
    for pid, process in now.processes.items():
        for other in process.waits_for:
            back = now.processes.get(other)
            if pid < other and back is not None and pid in back.waits_for and not _anything_between(now, pid, other):
                hints.append(f"{pid} and {other} wait for each other: each sleeps until the other posts")
        if process.state == "T":
            behind = sum(queue.total for channel, queue, to, _ in ways(now) if to == pid and not channel.lifeline)
            hints.append(
                f"{pid} is stopped (SIGSTOP, or a debugger)" + f"; {behind:,} bytes wait for it" * (behind > 0)
            )
    for channel, queue, to, by in ways(now):
        if queue.rate is not None and queue.rate > 0 and queue.file and not channel.lifeline:
            hints.append(f"{to or 'nobody'} takes less than {by} posts: {queue.total:,} bytes wait, and they grow")
    return hints


def ways(now: Snapshot) -> Iterator[tuple[Channel, Queue, int | None, int | None]]:
    """Each channel both ways: what waits, for whom (``None``: on its way), posted by whom."""
    for channel in now.channels:
        for queue, to, by in zip(channel.queues, channel.pids, channel.pids[::-1], strict=True):
            yield channel, queue, to, by


def _anything_between(now: Snapshot, one: int, other: int) -> bool:
    return any(queue.total for _, queue, to, by in ways(now) if {to, by} == {one, other})
