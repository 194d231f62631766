"""Nothing has a name: no listening socket, no named pipe, no file, no shared-memory name, before, during or after what
mpchannel does. And every descriptor is close-on-exec: what a process starts by itself gets none.

Each operation runs in a process of its own, with an empty TMPDIR, and stops at some points to look: at every
descriptor and mapping of all processes it has, at /proc/net/unix, and at what a program it starts would inherit. (Under
forkserver the standard library's own server listens at a name in TMPDIR. Fork and spawn need none.)
"""

from __future__ import annotations

import _posixshmem
import multiprocessing.shared_memory
import multiprocessing.synchronize
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import mpchannel

from . import children, pool_tasks, workers

PROJECT = Path(__file__).parent.parent
TIMEOUT = 20
LARGE = 4 << 20
MANY = 1000  # small messages: more than a socket holds
LISTENING = 0x10000  # __SO_ACCEPTCON


# Looking


def tree(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    for task in os.listdir(f"/proc/{pid}/task"):
        for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
            yield from tree(int(child))


def unix_sockets() -> dict[str, tuple[int, str]]:
    """By inode: flags and name."""
    found = {}
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        _, _, _, flags, _, _, inode, *name = line.split(maxsplit=7)
        found[inode] = int(flags, 16), " ".join(name)
    return found


def descriptors(pid: int) -> Iterator[tuple[int, str, bool]]:
    """Number, what it is, whether it is close-on-exec."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            what = os.readlink(f"/proc/{pid}/fd/{name}")
            info = Path(f"/proc/{pid}/fdinfo/{name}").read_text()
        except OSError:
            continue  # the one that lists
        flags = re.search(r"^flags:\s*([0-7]+)", info, re.MULTILINE)
        assert flags is not None
        yield int(name), what, bool(int(flags[1], 8) & os.O_CLOEXEC)


def look(from_the_start: set[str], main_inherits: set[str]) -> Counter[str]:
    """Raises ``AssertionError`` if anything has a name or would be inherited; else how many things of each kind there
    are.
    """
    seen: Counter[str] = Counter()
    named = unix_sockets()
    for pid in tree(os.getpid()):
        for number, what, close_on_exec in descriptors(pid):
            if what in from_the_start:
                continue
            kind = what.split(":")[0]
            if kind == "socket":
                inode = what[8:-1]
                if inode not in named:
                    named = unix_sockets()  # made meanwhile
                assert inode in named, f"{what} of {pid} is no Unix socket"
                flags, name = named[inode]
                assert not flags & LISTENING, f"{what} of {pid} listens"
                assert not name, f"{what} of {pid} has the name {name}"
            else:
                anonymous = kind in ("pipe", "anon_inode") or what == "/memfd:mpchannel (deleted)"
                assert anonymous or what.startswith(("/proc/", "/dev/null", "/dev/urandom")), (
                    f"descriptor {number} of {pid} is {what}"
                )
            ours = pid == os.getpid() or kind != "pipe"  # the standard library leaves its own open in its children
            assert close_on_exec or not ours, f"descriptor {number} of {pid}, {what}, is not close-on-exec"
            seen[kind] += 1
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "/dev/shm" not in maps, f"{pid} has mapped a shared-memory name"
        seen["mapped"] += maps.count("/memfd:mpchannel")
    assert not os.listdir(os.environ["TMPDIR"]), os.listdir(os.environ["TMPDIR"])
    inherited = inherits()
    assert inherited == main_inherits, f"a program that is started inherits {inherited - main_inherits}"
    return seen


def inherits() -> set[str]:
    """What a program has that this process starts without any care."""
    program = (
        "import os\nfor name in os.listdir('/proc/self/fd'): print(name, os.path.realpath(f'/proc/self/fd/{name}'))"
    )
    listing = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True, close_fds=False
    ).stdout
    return {line for line in listing.splitlines() if int(line.split()[0]) > 2 and "/proc/" not in line}


WRITES = os.O_CREAT | os.O_WRONLY | os.O_RDWR
MAKES_NAMES = {"socket.bind", "os.link", "os.symlink", "os.mkdir", "os.rename", "tempfile.mkstemp", "tempfile.mkdtemp"}


def run(name: str) -> None:
    """In a process of its own: an operation, with looks before, at the points where it yields, and after it."""
    made: list[str] = []

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event in MAKES_NAMES:
            made.append(f"{event} {args}")
        elif (
            event == "open"
            and args[2] & WRITES
            and not isinstance(args[0], int)
            and not str(args[0]).startswith(("/proc/self/fd/", "/dev/null"))
        ):
            made.append(f"open {args}")

    from_the_start = {what for _, what, _ in descriptors(os.getpid())}
    start, found = inherits(), Counter[str]()
    look(from_the_start, start)
    sys.addaudithook(watch)
    make, _posixshmem.shm_open = (
        _posixshmem.shm_open,
        lambda *args, **how: made.append(f"shm_open {args}") or make(*args, **how),
    )
    for _ in (OPERATIONS | {name: operation for name, (operation, _) in NAMED.items()})[name]():
        assert not made, made
        found |= look(from_the_start, start)
    look(from_the_start, start)
    assert not made, made
    print(" ".join(f"{kind}={count}" for kind, count in sorted(found.items())))


# Operations: each yields where to look.


def channel() -> Iterator[None]:
    port1, port2 = mpchannel.MessageChannel()
    yield
    heard: list[Any] = []
    port2.onmessage = lambda event: heard.append(event.data)
    port1.post_message("one")
    port1.drain(TIMEOUT)
    yield
    with pytest.raises(TimeoutError):
        port1.recv(0.01)
    port1.close()
    yield


def transfer() -> Iterator[None]:
    port1, port2 = mpchannel.MessageChannel()
    pairs = [mpchannel.MessageChannel() for _ in range(300)]  # more than one packet holds
    port1.post_message("a port", [pairs[0].port1])
    port1.post_message("an envelope", [pair.port2 for pair in pairs])
    yield
    ports = port2.receive(TIMEOUT).ports + port2.receive(TIMEOUT).ports
    assert len(ports) == 301
    yield


def large_message() -> Iterator[None]:
    port1, port2 = mpchannel.MessageChannel()
    for _ in range(2):  # the second one goes in memory that was kept
        port1.post_message(bytearray(LARGE))
        yield
        received = port2.recv(TIMEOUT)
        assert len(received) == LARGE
        yield
    for _ in range(20):  # these go through shared slots
        port1.post_message(bytes(100_000))
        assert len(port2.recv(TIMEOUT)) == 100_000
    yield


def overflow() -> Iterator[None]:
    port1, port2 = mpchannel.MessageChannel()
    inner = mpchannel.MessageChannel()
    for number in range(MANY):
        port1.post_message(number)
    port1.post_message("and a port", [inner.port1])
    yield
    assert [port2.recv(TIMEOUT) for _ in range(MANY // 2)] == list(range(MANY // 2))
    yield
    while port2.receive(TIMEOUT).data != "and a port":
        pass
    yield


def shared_buffer() -> Iterator[None]:
    port1, port2 = mpchannel.MessageChannel()
    buffer = mpchannel.SharedBuffer(LARGE)
    buffer[0] = 1
    yield
    port1.post_message(buffer, [buffer])
    yield
    assert port2.recv(TIMEOUT)[0] == 1
    yield


def process(method: str) -> Iterator[None]:
    port1, port2 = mpchannel.MessageChannel()
    child = mpchannel.get_context(method).Process(target=children.echo, args=(port2,))
    child.start()
    for message in ("small", bytes(LARGE)):
        port1.post_message(message)
        assert port1.recv(TIMEOUT) == message
        yield
    for number in range(MANY):
        port1.post_message(number)
    yield
    assert [port1.recv(TIMEOUT) for _ in range(MANY)] == list(range(MANY))
    port1.close()
    child.join(TIMEOUT)
    assert child.exitcode == 0
    child.close()


def worker(method: str) -> Iterator[None]:
    inner = mpchannel.MessageChannel()
    worker = mpchannel.Worker(workers.echo, context=mpchannel.get_context(method))
    worker.post_message("hello", [inner.port2])
    event = worker.receive(TIMEOUT)
    assert event.data[0] == "hello"
    yield
    worker.post_message("stop")
    worker.join(TIMEOUT)
    yield


def worker_pool(method: str) -> Iterator[None]:
    with mpchannel.WorkerPool(2, context=mpchannel.get_context(method)) as pool:
        assert [each.result(TIMEOUT) for each in [pool.submit(pool_tasks.square, n) for n in range(20)]][-1] == 361
        yield
    yield


def pipe() -> Iterator[None]:
    one, two = mpchannel.Pipe()
    one.send(bytes(LARGE))
    yield
    assert two.recv() == bytes(LARGE)
    for number in range(MANY):
        one.send(number)
    yield
    child = mpchannel.get_context("fork").Process(target=drain, args=(two,))
    child.start()
    assert one.recv() == MANY
    yield
    child.join(TIMEOUT)
    one.close()
    two.close()
    yield


def drain(connection: Any) -> None:
    connection.send(len([connection.recv() for _ in range(MANY)]))


def with_each(operation: Callable[[str], Iterator[None]]) -> dict[str, Callable[[], Iterator[None]]]:
    return {f"{operation.__name__} ({method})": partial(operation, method) for method in ("fork", "spawn")}


OPERATIONS: dict[str, Callable[[], Iterator[None]]] = {
    "channel": channel,
    "transfer": transfer,
    "large message": large_message,
    "overflow": overflow,
    "shared buffer": shared_buffer,
    "pipe": pipe,
    **with_each(process),
    **with_each(worker),
    **with_each(worker_pool),
}
IN_MEMORY = {"large message", "overflow", "shared buffer", "pipe", "process (fork)", "process (spawn)"}


# What must be seen, if it were so


def listens(name: str) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(name)
        sock.listen()
        yield


def named() -> Iterator[None]:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one.bind("\0mpchannel-test-" + os.urandom(8).hex())
    yield
    two.close()


def by_another_program(program: str) -> int:
    """A descriptor of a socket that this process did not make (or its audit hook would tell)."""
    near, far = socket.socketpair()
    with near, far:
        send = "import socket, sys; far = socket.socket(fileno=int(sys.argv[1])); "
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"{send}{program}; socket.send_fds(far, [b'x'], [sock.fileno()])",
                str(far.fileno()),
            ],
            pass_fds=[far.fileno()],
            check=True,
        )
        _, (number,), _, _ = socket.recv_fds(near, 1, 1)
    os.set_inheritable(number, False)
    return number


def named_before() -> Iterator[None]:
    number = by_another_program("sock = socket.socket(socket.AF_UNIX); sock.bind('')")
    yield
    os.close(number)


def listens_since_before() -> Iterator[None]:
    number = by_another_program("sock = socket.socket(socket.AF_UNIX); sock.bind(''); sock.listen()")
    yield
    os.close(number)


def on_the_network() -> Iterator[None]:
    with socket.socket(socket.AF_INET):
        yield


def named_pipe() -> Iterator[None]:
    path = os.path.join(os.environ["TMPDIR"], "pipe")
    os.mkfifo(path)
    yield


def file(delete: bool) -> Iterator[None]:
    with tempfile.NamedTemporaryFile() if delete else tempfile.TemporaryFile():
        yield


def shared_memory() -> Iterator[None]:
    memory = multiprocessing.shared_memory.SharedMemory(create=True, size=100)
    memory.close()
    memory.unlink()
    yield


def semaphore() -> Iterator[None]:
    semaphore = multiprocessing.get_context("fork").Semaphore()
    yield
    del semaphore


def inheritable() -> Iterator[None]:
    port1, port2 = mpchannel.MessageChannel()
    os.set_inheritable(port1.fileno(), True)
    yield
    port2.close()


def inherited() -> Iterator[None]:
    number = os.memfd_create("mpchannel", 0)
    os.dup2(number, 200)
    os.close(number)
    real, descriptors.__globals__["descriptors"] = descriptors, lambda pid: iter(())  # whoever looks there sees nothing
    yield
    descriptors.__globals__["descriptors"] = real


NAMED: dict[str, tuple[Callable[[], Iterator[None]], str]] = {
    "listens": (partial(listens, ""), "socket.bind"),
    "named": (named, "socket.bind"),
    "named before": (named_before, "has the name"),
    "listens since before": (listens_since_before, "listens"),
    "on the network": (on_the_network, "is no Unix socket"),
    "named pipe": (named_pipe, r"\['pipe'\]"),
    "file": (partial(file, True), "tempfile.mkstemp"),
    "unnamed file": (partial(file, False), "O_TMPFILE|open"),
    "shared memory": (shared_memory, "shm_open"),
    "semaphore": (semaphore, "mapped a shared-memory name"),
    "inheritable": (inheritable, "is not close-on-exec"),
    "inherited": (inherited, "a program that is started inherits"),
}


def outcome(name: str, folder: Path) -> subprocess.CompletedProcess[str]:
    program = "import sys; from tests.test_no_names import run; run(sys.argv[1])"
    (folder / "t").mkdir()
    return subprocess.run(
        [sys.executable, "-c", program, name],
        env=os.environ | {"TMPDIR": str(folder / "t"), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_has_a_name_and_nothing_is_inherited(name: str, tmp_path: Path) -> None:
    done = outcome(name, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    seen = dict(word.split("=") for word in done.stdout.split())
    assert int(seen["socket"]) >= 2
    if name in IN_MEMORY:
        assert int(seen["/memfd"]) >= 1
    assert not list((tmp_path / "t").iterdir())


@pytest.mark.parametrize("name", NAMED)
def test_a_name_or_a_descriptor_to_inherit_would_be_seen(name: str, tmp_path: Path) -> None:
    done = outcome(name, tmp_path)
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last.startswith("AssertionError: ")
    assert re.search(NAMED[name][1], last)
