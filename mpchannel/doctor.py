"""``python -m mpchannel doctor``: does this machine have what channels need? One line a question, with a remedy.

House rules: each feature is really tried, not looked up by name; a check that fails never ends the others; nothing is
changed, and nothing is left behind.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import select
import socket
import sys
import tempfile
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from . import _kernel
from ._sockdiag import unix_socket
from .channel import MessageChannel
from .context import get_context

OK, NOTE, MISSING = "ok", "note", "missing"
"""States of a finding. Only ``MISSING`` makes the exit code 1: something does not work without it."""

_FEW_DESCRIPTORS: Final = 1024
_PATIENCE: Final = 30.0  # seconds for a process to start and answer
_MIDDLING: Final = 160 * 1024  # bytes of the largest message that goes through a socket


class Finding(NamedTuple):
    """One line of the table."""

    group: str
    name: str
    state: str
    found: str
    remedy: str = ""


class _Trouble(Exception):
    """A check found something that is not as it should be; its text says what."""


# Kernel features. Each raises OSError, _Trouble or AttributeError where it does not work, and says what it found.


def _packet_sockets() -> str:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with one, other:
        one.send(b"ab")
        one.send(b"c")
        if (other.recv(8), other.recv(8)) != (b"ab", b"c"):
            raise _Trouble("packets do not stay whole")
        return f"room for {one.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF):,} bytes"


def _passing() -> str:
    one, other = _kernel.socket_pair()
    _kernel.send_with(one, (b"x",), (one.fileno(),))
    _, descriptors = _kernel.receive_with(other, bytearray(1), _kernel.NOW)
    if len(descriptors) != 1:
        raise _Trouble("a descriptor that was sent did not arrive")
    arrived = descriptors.claim_socket()
    if os.get_inheritable(arrived.fileno()):
        raise _Trouble("descriptors arrive without close-on-exec")
    return "descriptors arrive"


def _anonymous_memory() -> str:
    memory = _kernel.Memory.create()
    memory.resize(_kernel.PAGE)
    memory.close()
    return "memfd_create"


def _seals() -> str:
    memory = _kernel.Memory.create(append=True)
    memory.append((b"x",), 1, None)
    memory.seal(_kernel.SEAL_GROW)
    try:
        memory.append((b"x",), 1, None)
    except PermissionError:
        return "a sealed file does not grow"
    finally:
        memory.close()
    raise _Trouble("a sealed file grows all the same")


def _bells() -> str:
    bell = _kernel.Bell()
    epoll = select.epoll()
    try:
        epoll.register(bell, select.EPOLLIN)
        bell.ring()
        if not epoll.poll(1):
            raise _Trouble("epoll does not see an eventfd")
    finally:
        epoll.close()
        bell.close()
    return "eventfd wakes epoll"


def _queue_lengths() -> str:
    one, other = _kernel.socket_pair()
    one.send(b"x")
    held = _kernel.queued(one)
    other.recv(1)
    if not held or _kernel.queued(one):
        raise _Trouble("the kernel does not tell what waits in a socket (SIOCOUTQ)")
    return f"a small message takes {held} bytes"


def _pidfd() -> str:
    _kernel.ProcessHandle(os.getpid()).close()
    return "pidfd_open"


def _proc() -> str:
    number = os.open(os.devnull, os.O_RDONLY)
    try:
        if os.readlink(f"/proc/self/fd/{number}") != os.devnull:
            raise _Trouble("/proc/self/fd is not what it should be")
    finally:
        os.close(number)
    return "/proc is mounted"


def _leases() -> str:
    memory = _kernel.Memory.create()
    once_more = memory.reopened()
    try:
        if not once_more.only_holder:
            raise _Trouble("no write leases on memory")
    finally:
        once_more.close()
        memory.close()
    return "memory of large messages is used again"


def _socket_diagnosis() -> str:
    one, other = _kernel.socket_pair()
    one.send(b"xyz")
    found = unix_socket(os.fstat(other.fileno()).st_ino)
    if found is None or (found.peer, found.waiting) != (os.fstat(one.fileno()).st_ino, 3):
        raise _Trouble("the kernel does not tell what waits in a UNIX socket (CONFIG_UNIX_DIAG)")
    return "NETLINK_SOCK_DIAG tells of UNIX sockets"


_NEW_KERNEL: Final = "use Linux 5.3 or newer; in a sandbox, allow the system calls named here"

_FEATURES: Final[tuple[tuple[str, Callable[[], str], bool, str], ...]] = (
    # name, check, whether channels need it, remedy
    ("packet sockets", _packet_sockets, True, f"AF_UNIX with SOCK_SEQPACKET: {_NEW_KERNEL}"),
    ("descriptor passing", _passing, True, f"SCM_RIGHTS: {_NEW_KERNEL}"),
    ("anonymous memory", _anonymous_memory, True, f"memfd_create; sysctl vm.memfd_noexec below 2: {_NEW_KERNEL}"),
    ("file seals", _seals, True, f"fcntl F_ADD_SEALS: {_NEW_KERNEL}"),
    ("waking", _bells, True, f"eventfd and epoll: {_NEW_KERNEL}"),
    ("queue lengths", _queue_lengths, True, f"ioctl SIOCOUTQ on a UNIX socket: {_NEW_KERNEL}"),
    ("process handles", _pidfd, True, f"pidfd_open, for Worker and close events: {_NEW_KERNEL}"),
    ("/proc", _proc, True, "mount it: mount -t proc proc /proc; containers need no option for that"),
    ("recycling", _leases, False, "without leases (F_SETLEASE) large messages use fresh memory each time: slower"),
    ("socket diagnosis", _socket_diagnosis, False, "for top, and counts in repr(port): modprobe unix_diag"),
)


def _try(group: str, name: str, check: Callable[[], str], needed: bool, remedy: str) -> Finding:
    try:
        return Finding(group, name, OK, check())
    except Exception as error:  # whatever it is: that is the finding
        text = str(error) or type(error).__name__
        return Finding(group, name, MISSING if needed else NOTE, text, remedy)


def _features() -> list[Finding]:
    lacking = _kernel.missing()
    found = [Finding("kernel", name, MISSING, "not on this system", _NEW_KERNEL) for name in lacking]
    return found + [_try("kernel", *feature) for feature in _FEATURES]


# Limits


def _number(path: str) -> int | None:
    try:
        with open(path) as file:
            return int(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return None  # not there, or not told to us: nothing to say of it


def _in_words(limit: int) -> str:
    return "unlimited" if limit < 0 else f"{limit:,}"


def _limits() -> list[Finding]:
    try:
        import resource
    except ImportError:
        return []  # told of with the features
    found = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_open = len(os.listdir("/proc/self/fd")) - 1 if os.path.isdir("/proc/self/fd") else 0
    few = 0 <= soft < _FEW_DESCRIPTORS
    found.append(
        Finding(
            "limits",
            "open files",
            NOTE if few else OK,
            f"{is_open} open, {_in_words(soft)} allowed (soft), {_in_words(hard)} (hard)",
            f"each port takes one: ulimit -n {_FEW_DESCRIPTORS}, up to the hard limit" if few else "",
        )
    )
    found.append(
        Finding(
            "limits",
            "in flight",
            NOTE if few else OK,
            f"{_in_words(soft)} descriptors of this user sent and not yet received",
            f"ports and large messages under way count: ulimit -n {_FEW_DESCRIPTORS}" if few else "",
        )
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    found.append(Finding("limits", "processes", OK, f"{_in_words(soft)} (soft), {_in_words(hard)} (hard)"))
    room = _number("/proc/sys/net/core/wmem_default")
    if room is not None:
        small = room < _MIDDLING
        found.append(
            Finding(
                "limits",
                "socket room",
                NOTE if small else OK,
                f"net.core.wmem_default is {room:,} bytes",
                "messages of middling size have to go through a file: sysctl net.core.wmem_default=212992"
                if small
                else "",
            )
        )
    everywhere = _number("/proc/sys/fs/file-max")
    if everywhere is not None:
        found.append(Finding("limits", "the whole system", OK, f"fs.file-max is {everywhere:,} open files"))
    return found


# Processes


def _say_pid(port: Any) -> None:
    port.post_message(os.getpid())


def _start(method: str) -> str:
    with MessageChannel() as (near, far):
        process = get_context(method).Process(target=_say_pid, args=(far,))
        process.start()
        try:
            if near.recv(_PATIENCE) != process.pid:
                raise _Trouble("somebody else answered")
        except BaseException:
            process.kill()
            raise
        finally:
            process.join()
            process.close()
    return "a process started and posted a message"


def _start_methods() -> list[Finding]:
    offered = multiprocessing.get_all_start_methods()
    default = get_context().get_start_method()
    found = []
    for method in ("fork", "spawn", "forkserver"):
        if method not in offered:
            found.append(Finding("start", method, NOTE, "this Python does not offer it", "use another start method"))
            continue
        remedy = "is a sandbox or a limit in the way of new processes? ulimit -u, and the open files above"
        finding = _try("start", method, lambda method=method: _start(method), True, remedy)  # type: ignore[misc]
        found.append(finding._replace(found=finding.found + " (the default)") if method == default else finding)
    return found


# Versions, and places


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions(ours: str) -> list[Finding]:
    found = [
        Finding("versions", "mpchannel", OK, ours),
        Finding("versions", "Python", OK, f"{platform.python_version()} ({sys.implementation.name})"),
        Finding("versions", "kernel", OK, f"{platform.system()} {platform.release()} {platform.machine()}"),
    ]
    pickler = _version("cloudpickle")
    if pickler is None:
        text = "functions of notebooks and closures cannot travel: pip install 'cloudpickle>=3.0'"
        found.append(Finding("versions", "cloudpickle", MISSING, "not installed", text))
    else:
        found.append(Finding("versions", "cloudpickle", OK, pickler))
    for name, use in (("numpy", "arrays"), ("rich", "the live view of `top`")):
        version = _version(name)
        remedy = "" if version else f"only for {use}: pip install {name}"
        found.append(Finding("versions", name, OK if version else NOTE, version or "not installed", remedy))
    return found


def _places() -> list[Finding]:
    try:
        with tempfile.NamedTemporaryFile() as file:
            where = os.path.dirname(file.name)
            room = os.statvfs(where)
    except OSError as error:
        remedy = "set TMPDIR to a folder that you can write to: the fork server and managers need one"
        return [Finding("places", "TMPDIR", MISSING, str(error), remedy)]
    long = len(where) > 80  # the path of a socket has room for 107 characters
    remedy = "too long a path for the sockets of managers and the fork server: TMPDIR=/tmp" if long else ""
    free = f"{where}, {room.f_bavail * room.f_frsize >> 20:,} MiB free"
    return [Finding("places", "TMPDIR", NOTE if long else OK, free, remedy)]


def examine(ours: str) -> list[Finding]:
    """All findings. Starts one short-lived process for each start method. *ours*: the version of mpchannel."""
    return [*_features(), *_limits(), *_start_methods(), *_versions(ours), *_places()]


# The command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Try each kernel feature that channels need, and say what is missing, with a remedy. The exit code is 1 if "
        "something does not work."
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(options: argparse.Namespace) -> int:
    """Examine and print. Returns the exit code: 1 if something that is needed is missing."""
    findings = examine(_version("mpchannel") or "from a folder, not installed")
    missing = [each for each in findings if each.state == MISSING]
    if options.json:
        print(json.dumps({"ok": not missing, "findings": [each._asdict() for each in findings]}, indent=1))
    else:
        _print_table(findings)
        if missing:
            print(f"\n{len(missing)} missing: {', '.join(each.name for each in missing)}")
        else:
            print("\neverything that channels need is here")
    return 1 if missing else 0


def _print_table(findings: list[Finding]) -> None:
    groups = max(len(each.group) for each in findings)
    names = max(len(each.name) for each in findings)
    states = max(len(each.state) for each in findings)
    before = ""
    for each in findings:
        group = "" if each.group == before else each.group
        before = each.group
        print(f"{group:<{groups}}  {each.name:<{names}}  {each.state:<{states}}  {each.found}")
        if each.remedy:
            print(f"{'':{groups}}  {'':{names}}  {'':{states}}  -> {each.remedy}")
