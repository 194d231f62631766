"""What the kernel tells of a process and its descendants: who holds which end, what waits where, who waits for whom.

All of it is read from outside (``/proc`` and ``NETLINK_SOCK_DIAG``), so it works on processes that are stuck or
stopped, and costs them nothing. The kernel shows it to the same user only (and to root). Ends of ``multiprocessing``'s
own pipes are not shown: these are streams, and ends of channels are sockets of packets.

An end is told by the inode of its socket, which stays the same wherever it moves.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import stat
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from .._sockdiag import unix_sockets
from .._wire import ANNOUNCEMENT, PROCESS

_TICKS: Final = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_MEMORY: Final = "/memfd:mpchannel"  # what _kernel.Memory calls what it makes

# System calls that wait, and how they are told for what: a descriptor, an array of ``pollfd``, an epoll object; a lock.
_CALLS: Final[dict[str, dict[int, str]]] = {
    "x86_64": {0: "one", 45: "one", 47: "one", 7: "poll", 271: "poll", 232: "epoll", 281: "epoll", 202: "lock"},
    "aarch64": {63: "one", 207: "one", 212: "one", 73: "poll", 22: "epoll", 98: "lock"},
}


class LookError(Exception):
    """There is nothing to be seen: no such process, or another user's."""


@dataclass
class Thread:
    tid: int
    name: str
    waits: str
    """``message``; ``thread``, for another one of its process; ``something else``; or nothing: it runs."""
    sockets: list[int] = field(default_factory=list)  # inodes of the ends it waits on


@dataclass
class Process:
    pid: int
    parent: int
    name: str
    state: str
    """As ``ps`` has it: R running, S sleeping, T stopped, Z ended and not yet reaped, D in the kernel."""
    age: float  # seconds
    cpu: float  # seconds
    memory: int  # bytes, resident
    overflow: int  # bytes of memory held by large messages and overflow files it has open
    threads: list[Thread]

    @property
    def words(self) -> str:
        return {"R": "running", "T": "stopped", "Z": "ended", "D": "in the kernel"}.get(self.state, "sleeping")


@dataclass
class End:
    """One end of a channel."""

    inode: int
    peer: int | None  # the other end; None: it is gone
    unread: int  # bytes that were sent to this end and not yet taken
    held: int  # bytes of the kernel's memory that these take: of some 210,000
    overflow: int  # bytes of memory of the overflow file behind these, as far as it is clear whose it is
    holders: list[tuple[int, int]]  # (pid, descriptor)


@dataclass
class Look:
    """All of it, at one moment."""

    when: float  # on the monotonic clock
    processes: list[Process]
    ends: list[End]
    hints: list[str]

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def channels(self) -> Iterator[tuple[End, End | None]]:
        """Each channel once: its two ends, or the one that is left of it, or that is held by nobody else here."""
        known = {end.inode: end for end in self.ends}
        for end in self.ends:
            other = known.get(end.peer or -1)
            if other is None or end.inode < other.inode:
                yield end, other


def look_at(root: int) -> Look:
    """The process *root* and its descendants. Raises ``LookError``, which says why nothing can be seen."""
    pids = _family(root)
    if not os.access(f"/proc/{root}/fd", os.R_OK) or not _may_see(root):
        raise LookError(f"process {root} belongs to another user; only the same user (or root) can look at it")
    held: dict[int, list[tuple[int, int]]] = defaultdict(list)
    processes = []
    files: dict[int, tuple[int, set[int]]] = {}  # by inode, overflow files: bytes, and who has them open
    for pid in pids:
        try:
            processes.append(_process(pid, held, files))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it ended while we looked, or became another user's
    sockets = unix_sockets()
    ends = [
        End(inode, each.peer or None, _unread(each.waiting), other.held if other else 0, 0, sorted(held[inode]))
        for inode, each in sorted(sockets.items())
        if inode in held and each.kind == socket.SOCK_SEQPACKET
        for other in (sockets.get(each.peer),)
    ]
    now = Look(time.monotonic(), processes, ends, [])
    _attribute(files, now)
    now.hints = hints(now)
    return now


def _unread(waiting: int) -> int:
    return 0 if waiting == PROCESS.size else waiting  # a note of who holds the other end is no message


def _attribute(files: dict[int, tuple[int, set[int]]], now: Look) -> None:
    """An overflow file is announced in a socket, and only its two sides have it open: whose it is, if one end fits."""
    holders = {end.inode: {pid for pid, _ in end.holders} for end in now.ends}
    for size, having in files.values():
        fitting = []
        for end in now.ends:
            writers = holders.get(end.peer or 0, set())
            # (Whoever has not read that far yet has no descriptor of it.)
            if end.unread >= ANNOUNCEMENT.size and having & writers and having <= writers | holders[end.inode]:
                fitting.append(end)
        fitting = [end for end in fitting if end.held > _MUCH] or fitting  # a file is begun when the socket is full
        if len(fitting) == 1:
            fitting[0].overflow += size


def _family(root: int) -> list[int]:
    """The process and its descendants, parents first."""
    if not os.path.exists(f"/proc/{root}"):
        raise LookError(f"there is no process {root}")
    children: dict[int, list[int]] = defaultdict(list)
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                children[int(_stat(int(name))[1])].append(int(name))
    found, pending = [], [root]
    while pending:
        pid = pending.pop(0)
        found.append(pid)
        pending += sorted(children[pid])
    return found


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` behind the name: state first, then the parent."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()


def _may_see(pid: int) -> bool:
    try:
        os.listdir(f"/proc/{pid}/fd")
    except PermissionError:
        return False
    except OSError:
        pass
    return True


def _process(pid: int, held: dict[int, list[tuple[int, int]]], files: dict[int, tuple[int, set[int]]]) -> Process:
    fields = _stat(pid)
    with open("/proc/uptime") as file:
        up = float(file.read().split()[0])
    numbers: dict[int, int] = {}  # descriptor -> inode of the socket
    memory: dict[int, int] = {}
    bells: set[int] = set()  # by which another thread wakes one that waits
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        with contextlib.suppress(OSError):
            about = os.stat(path)
            if stat.S_ISSOCK(about.st_mode):
                numbers[int(name)] = about.st_ino
                held[about.st_ino].append((pid, int(name)))
            elif (where := os.readlink(path)).startswith(_MEMORY):
                memory[about.st_ino] = about.st_blocks * 512
                if _appends(pid, name):
                    files.setdefault(about.st_ino, (about.st_blocks * 512, set()))[1].add(pid)
            elif where == "anon_inode:[eventfd]":
                bells.add(int(name))
    threads = []
    for name in sorted(os.listdir(f"/proc/{pid}/task"), key=int):
        with contextlib.suppress(OSError):
            threads.append(_thread(pid, int(name), numbers, bells))
    return Process(
        pid=pid,
        parent=int(fields[1]),
        name=_title(pid),
        state=fields[0],
        age=up - int(fields[19]) / _TICKS,
        cpu=(int(fields[11]) + int(fields[12])) / _TICKS,
        memory=int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        overflow=sum(memory.values()),
        threads=threads,
    )


def _appends(pid: int, number: str) -> bool:
    """Whether a descriptor is in append mode, as those of overflow files are and no others of ours."""
    with open(f"/proc/{pid}/fdinfo/{number}") as file:
        return any(int(line.split()[1], 8) & os.O_APPEND for line in file if line.startswith("flags:"))


def _title(pid: int) -> str:
    """What the process was started as, in a few words."""
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        words = [word.decode(errors="replace") for word in file.read().split(b"\0") if word]
    if not words:
        return "(ended)"
    joined = " ".join(words)
    for mark, name in (("spawn_main", "spawned child"), ("forkserver", "fork server"), ("resource_tracker", "tracker")):
        if mark in joined:
            return name
    words[0] = os.path.basename(words[0])
    return " ".join(os.path.basename(word) if "/" in word else word for word in words if "\n" not in word)[:40]


def _thread(pid: int, tid: int, numbers: dict[int, int], bells: set[int]) -> Thread:
    with open(f"/proc/{pid}/task/{tid}/comm") as file:
        thread = Thread(tid, file.read().strip(), "")
    try:
        with open(f"/proc/{pid}/task/{tid}/syscall") as file:
            words = file.read().split()
    except PermissionError:
        return thread
    if words[0] == "running" or int(words[0]) < 0:
        return thread
    kind = _CALLS.get(platform.machine(), {}).get(int(words[0]), "something else")
    first, second = int(words[1], 16), int(words[2], 16)
    waited_on: list[int] = []
    if kind == "one":
        waited_on = [first]
    elif kind == "poll":
        with contextlib.suppress(OSError, struct.error), open(f"/proc/{pid}/mem", "rb") as memory:
            memory.seek(first)
            waited_on = [number for number, _, _ in struct.iter_unpack("=iHH", memory.read(8 * min(second, 65_536)))]
    elif kind == "epoll":
        with contextlib.suppress(OSError), open(f"/proc/{pid}/fdinfo/{first}") as file:
            waited_on = [int(line.split()[1]) for line in file if line.startswith("tfd:")]
    thread.sockets = [numbers[number] for number in waited_on if number in numbers]
    others = [number for number in waited_on if number not in numbers]
    if thread.sockets and bells.issuperset(others):
        thread.waits = "message"
    elif kind == "lock" or (waited_on and bells.issuperset(others)):
        thread.waits = "thread"
    else:
        thread.waits = "something else"
    return thread


# Who waits for whom


def waiting_for(now: Look) -> dict[int, set[int]]:
    """Processes all whose threads wait, for messages or for each other: from whom alone these messages can come."""
    ends = {end.inode: end for end in now.ends}
    found: dict[int, set[int]] = {}
    for process in now.processes:
        waits = [thread for thread in process.threads if thread.waits == "message"]
        all_wait = all(thread.waits in ("message", "thread") for thread in process.threads)
        if process.state == "T" or not waits or not all_wait:
            continue
        waited_on = [ends.get(inode) for thread in waits for inode in thread.sockets]
        peers = [ends.get(end.peer or 0) if end is not None and not end.unread else None for end in waited_on]
        if all(peer is not None for peer in peers):  # else something is there, or will come from elsewhere
            found[process.pid] = {pid for peer in peers if peer is not None for pid, _ in peer.holders}
    return found


def hints(now: Look) -> list[str]:
    """What is worth a look, in words."""
    told = []
    names = {process.pid: f"{process.pid} ({process.name})" for process in now.processes}
    waiting = waiting_for(now)
    stuck = set(waiting)
    while left := {pid for pid in stuck if not waiting[pid] <= stuck}:
        stuck -= left  # somebody it waits for is at work
    seen: set[int] = set()
    for pid in sorted(stuck - {pid for pid in stuck if waiting[pid] == {pid}}):
        if pid in seen:
            continue
        circle, pending = set(), [pid]
        while pending:
            each = pending.pop()
            if each not in circle:
                circle.add(each)
                pending += waiting[each]
        seen |= circle
        who = " and ".join(names[each] for each in sorted(circle))
        told.append(f"{who} wait for each other: each for a message, and none is under way")
    for pid in sorted(stuck):
        if waiting[pid] == {pid}:
            told.append(f"{names[pid]} waits for a message that only it could post itself")
    stopped = {process.pid for process in now.processes if process.state == "T"}
    for process in now.processes:
        if process.pid in stopped:
            told.append(f"{names[process.pid]} is stopped (SIGCONT lets it go on)")
    behind: dict[int, int] = defaultdict(int)
    for end in now.ends:
        if end.held > _MUCH or end.overflow:
            for pid in {pid for pid, _ in end.holders}:
                behind[pid] += end.unread + end.overflow
    for pid, unread in behind.items():
        if pid not in stopped:
            told.append(f"{names[pid]} is behind: {unread:,} bytes wait for it")
    return told


_MUCH: Final = 100_000  # bytes of the kernel's memory: the socket is half full
