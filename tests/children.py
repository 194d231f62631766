"""What child processes of the tests run. Imports nothing but the package and the standard library."""

from __future__ import annotations

import gc
import io
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mpchannel
from mpchannel import _shared

Port = mpchannel.MessagePort[Any, Any]


def echo(port: Port) -> None:
    """Send everything back until the channel closes."""
    for message in port:
        port.post_message(message)


def post_and_return(port: Port, *messages: Any) -> None:
    for message in messages:
        port.post_message(message)


def report_pid_of_received_port(port: Port) -> None:
    """Receive one port, post the process id on it, and close it."""
    event = port.receive()
    with event.ports[0] as received:
        received.post_message(os.getpid())


# Ports that travel


def events_of(port: Port) -> Iterator[Any]:
    """Message events, until the channel closes."""
    while True:
        try:
            yield port.receive()
        except mpchannel.PortClosedError:
            return


def send_back_ports(port: Port) -> None:
    """Send every message back with the ports that came with it, unused."""
    for event in events_of(port):
        port.post_message(event.data, transfer=event.ports)


def post_on_ports_and_send_them_back(port: Port) -> None:
    """Post each message on the ports that came with it, and send these back."""
    for event in events_of(port):
        for each in event.ports:
            each.post_message(event.data)
        port.post_message(None, transfer=event.ports)


# Processes that end


def end(how: str) -> None:
    """End this process in a way that ``ENDS`` lists."""
    if how == "sys.exit":
        sys.exit(3)
    if how == "raise":
        sys.stderr = io.StringIO()  # no traceback in the output of the tests
        raise LookupError("a child that fails")
    if how == "_exit":
        os._exit(3)
    if how != "return":
        os.kill(os.getpid(), getattr(signal, how))


ENDS = {"return": 0, "sys.exit": 3, "raise": 1, "_exit": 3, "SIGTERM": -15, "SIGKILL": -9}
"""Ways to end, and the exit codes they give."""


def end_when_told(gate: Port, how: str, *_held: Any) -> None:
    """Say "ready" at the gate, wait for a word there, and end; holding whatever else was given."""
    gate.post_message("ready")
    gate.recv()
    end(how)


def close_collect_and_return(port: Port) -> None:
    port.close()
    del port
    gc.collect()


def drop_and_wait(gate: Port) -> None:
    """Receive a port, let it be collected, and wait at the gate."""
    event = gate.receive()
    del event
    gc.collect()
    gate.recv()


def post_first_last_and_close(port: Port) -> None:
    """For each port that comes: post two messages and close it."""
    for event in events_of(port):
        (each,) = event.ports
        each.post_message("first")
        each.post_message("last")
        each.close()


def report_close(port: Port, report: Port) -> None:
    """Post what the close event of a started port says."""
    closed = threading.Event()
    events: list[Any] = []
    port.onclose = lambda event: (events.append(event), closed.set())
    port.start()
    report.post_message("started")
    closed.wait(20)
    report.post_message([(each.type, each.reason, each.pid) for each in events])


def lend_to_grandchild(method: str, *ports: Port) -> None:
    """Give ports to a process of its own, which says its pid on each and waits for the first to close."""
    grandchild = multiprocessing.get_context(method).Process(target=say_pid_and_wait, args=ports)
    grandchild.start()
    grandchild.join()


def say_pid_and_wait(*ports: Port) -> None:
    for port in ports:
        port.post_message(os.getpid())
    ports[0].wait_closed()


def leave_a_thread_posting(port: Port, count: int) -> None:
    """Return while another thread, when told, still posts."""

    def post() -> None:
        port.recv()
        for number in range(count):
            port.post_message(number)

    threading.Thread(target=post).start()
    port.post_message("returning")


# Ports given at the start of a process


def answer(port: Port) -> None:
    """Send one message back."""
    port.post_message(("answer", port.recv()))


@dataclass
class Luggage:
    """Carries a port."""

    port: Port
    label: str = "fragile"

    def answer(self) -> None:
        answer(self.port)


def answer_in(thing: Any) -> None:
    """Answer on the port in nested containers."""
    while not isinstance(thing, mpchannel.MessagePort):
        if isinstance(thing, Luggage):
            thing = thing.port
        elif isinstance(thing, dict):
            (thing,) = thing.values()
        else:
            (thing,) = thing
    answer(thing)


class _Talker:
    """A process that carries a port as an attribute."""

    def __init__(self, port: Port) -> None:
        super().__init__()
        self.luggage = {"port": port}

    def run(self) -> None:
        answer(self.luggage["port"])


TALKERS: dict[tuple[str, str], type] = {}
for _family, _get_context in (("mpchannel", mpchannel.get_context), ("stdlib", multiprocessing.get_context)):
    for _method in ("fork", "spawn", "forkserver"):
        _name = f"Talker_{_family}_{_method}"  # found by its name when it is unpickled
        TALKERS[_family, _method] = globals()[_name] = type(
            _name, (_Talker, _get_context(_method).Process), {"__module__": __name__}
        )


def answer_each_with_its_place(*ports: Port) -> None:
    for place, port in enumerate(ports):
        port.post_message((place, port.recv(), os.getpid()))


def ping(port: Port, report: Port, gate: Port, count: int) -> None:
    """When told, send numbers and report what comes back."""
    gate.recv()
    answers = []
    for number in range(count):
        port.post_message(number)
        answers.append(port.recv())
    report.post_message(answers)


def introduce_and_leave(method: str, _life: Port, near: Port, far: Port, report: Port, gate: Port, count: int) -> None:
    """Start two processes that talk to each other, and be gone."""
    context = mpchannel.get_context(method)
    context.Process(target=echo, args=(far,)).start()
    context.Process(target=ping, args=(near, report, gate, count)).start()
    os._exit(0)


def forward(source: Port, onward: Port) -> None:
    """Hand every message on with its ports, unused."""
    for event in events_of(source):
        onward.post_message(event.data, transfer=event.ports)


def ignore(*_: Any) -> None:
    """Return."""


def fork_and_wait(given: Port, life: Port) -> None:
    """Start a process with one of the ports, keep the other, and wait to be killed."""
    mpchannel.get_context("fork").Process(target=echo, args=(life,)).start()
    given.post_message("started")
    given.recv()


kept: Any = None
"""For a port that a test leaves where a forked child finds it."""


def use_kept(report: Port) -> None:
    """Try what cannot be done with a port that was not given, and report the errors."""
    attempts = {
        "post_message": lambda: kept.post_message("from a child"),
        "receive": lambda: kept.receive(5),
        "poll": lambda: kept.poll(),
        "transfer": lambda: report.post_message(None, transfer=[kept]),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except mpchannel.ChannelError as error:
            report.post_message((name, type(error).__name__, str(error)))
    kept.onmessage = print
    kept.start()
    kept.close()
    report.post_message(("state", kept.closed, kept.detached))
    report.recv()


def post_many_and_end(port: Port, size: int, count: int, how: str) -> None:
    for number in range(count):
        port.post_message(number.to_bytes(4, "little") + bytes(size - 4))
    end(how)


def say_started_and_report_all(port: Port, report: Port) -> None:
    """Take everything until the channel closes, and report it."""
    report.post_message("started")
    report.post_message(list(port))


def report_state(port: Port, report: Port) -> None:
    report.post_message((port.started, port.detached, port.onmessage, port.onclose, list(port)))


def answer_requests(port: Port) -> None:
    """For each request: post the numbers up to it on the port that came with it, and close that."""
    for event in events_of(port):
        with event.ports[0] as reply:
            for number in range(event.data):
                reply.post_message(number)


def report_queue_of_received_port(port: Port) -> None:
    """Receive one port, take all that is queued there, and report it with what came along in it."""
    (arrived,) = port.receive().ports
    found = []
    for event in events_of(arrived):
        found.append(event.data)
        for each in event.ports:
            each.post_message(event.data)
    port.post_message(found)


# Ports that travel by multiprocessing's own doors


def post_pid(*ports: Port) -> int:
    """Post this process's id on each port, and return it."""
    for port in ports:
        port.post_message(os.getpid())
    return os.getpid()


def post_pid_many_times(port: Port, count: int) -> None:
    for _ in range(count):
        port.post_message(os.getpid())


_kept_ports: list[Port] = []


def make_echoing_port(label: str) -> dict[str, Any]:
    """One end of a new channel, whose other end lives in this process and echoes."""
    near, far = mpchannel.MessageChannel()
    _kept_ports.append(near)
    near.onmessage = lambda event: near.post_message((label, event.data))
    return {"label": label, "port": far}


def post_pid_on_ports_from(get: Callable[[], Port], count: int) -> None:
    for _ in range(count):
        post_pid(get())


def put_port_that_says_pid(put: Callable[[Port], object], gate: Port) -> None:
    """Put one end of a new channel, say on the other end who this is, and stay until told."""
    near, far = mpchannel.MessageChannel()
    near.post_message(os.getpid())
    put(far)
    gate.recv()


def send_and_leave(connection: Any, port: Port) -> None:
    connection.send(port)
    os._exit(0)


# For the tests themselves


@contextmanager
def running(process: Any, ends_with: int | None = 0) -> Iterator[Any]:
    """Start a process and, behind the block, wait for its end. *ends_with*: its exit code; ``None``: any."""
    process.start()
    try:
        yield process
        process.join(20)
        if process.exitcode is None or ends_with not in (None, process.exitcode):
            raise AssertionError(f"{process} ended with {process.exitcode}, not {ends_with}")
    finally:
        if process.is_alive():
            process.kill()
            process.join(20)


def wait_until_asleep() -> None:
    """Until another thread sleeps in ``poll``, waiting for a message."""
    deadline = time.monotonic() + 20
    while not any(frame.f_code.co_name == "wait_readable" for frame in sys._current_frames().values()):
        if time.monotonic() > deadline:
            raise AssertionError("no thread fell asleep")
        time.sleep(0.001)


def let_deliver() -> None:
    """Let the delivery thread do all that it has to do by now."""
    for _ in range(2):
        near, far = mpchannel.MessageChannel()
        heard = threading.Event()
        far.onmessage = lambda event, heard=heard: heard.set()
        near.post_message(None)
        if not heard.wait(20):
            raise AssertionError("the delivery thread is stuck")
        near.close()
        far.close()


# Floods


class FailsToLoad:
    """A message that cannot be loaded."""

    def __reduce__(self) -> Any:
        return _fail_to_load, ()


def _fail_to_load() -> None:
    raise LookupError("fails to load, as it was made to")


def post_in_bursts(port: Port, count: int) -> None:
    """Post the numbers up to *count*, waiting at times until all was taken."""
    for number in range(count):
        port.post_message(number)
        if number % 3001 == 0:
            port.drain(20)


def take_and_give_back(results: Port, port: Port, count: int) -> None:
    """Take *count* messages and post them as one, with the port."""
    results.post_message([port.recv() for _ in range(count)], [port])


def post_small_then_huge(gate: Port, port: Port, count: int, size: int) -> None:
    """Post *count* numbers, wait for a word at the gate, post *size* zeros, and be killed at the next word."""
    huge = bytes(size)
    for number in range(count):
        port.post_message(number)
    gate.post_message("posted the numbers")
    gate.recv()
    port.post_message(huge)
    gate.recv()
    os.kill(os.getpid(), signal.SIGKILL)


class Waiter(threading.Thread):
    """Calls a function in a thread, and keeps what came of it."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self._call = call
        self._outcome: object = None
        self.start()

    def run(self) -> None:
        try:
            self._outcome = self._call()
        except BaseException as error:  # noqa: BLE001 - it is the outcome
            self._outcome = error
        finally:
            del self._call

    def blocks(self) -> Waiter:
        """Return once the thread sleeps in the kernel and goes on sleeping, which it does nowhere but in its call."""
        deadline = time.monotonic() + 20
        asleep = 0
        while asleep < 20:
            with open(f"/proc/self/task/{self.native_id}/stat") as stat:
                asleep = asleep + 1 if stat.read().rpartition(")")[2].split()[0] == "S" else 0
            if time.monotonic() > deadline:
                raise AssertionError("the thread does not wait")
            time.sleep(0.0005)
        return self

    def result(self) -> Any:
        """What the function returned, or the exception that it raised."""
        self.join(20)
        if self.is_alive():
            raise AssertionError("the thread still waits")
        return self._outcome


# Processes that are killed


def hold(port: Port) -> None:
    """Say "ready" and hold the port until killed."""
    port.post_message("ready")
    signal.pause()


def hold_received(port: Port) -> None:
    """Receive a message with ports, say so, and hold it all until killed."""
    port.post_message("ready")
    event = port.receive()
    port.post_message("received")
    signal.pause()
    raise AssertionError(event)


def hold_with_forked_child(port: Port, pipe: Any) -> None:
    """``hold``, with a child of ``os.fork`` that outlives this process and answers at *pipe* with its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            pipe.recv()
            pipe.send(os.getpid())
        finally:
            os._exit(0)
    port.post_message("ready")
    port.post_message(pid)
    signal.pause()


def hold_with_subprocess(port: Port, pipe: Any) -> None:
    """``hold``, with a program that outlives this process, got all inheritable descriptors, and copies from *pipe*."""
    code = "import os, sys; os.write(1, os.read(0, 1000))"
    with subprocess.Popen(
        [sys.executable, "-Sc", code], stdin=pipe.fileno(), stdout=pipe.fileno(), close_fds=False
    ) as program:
        pipe.close()
        hold(port)
        raise AssertionError(program)


def hold_with_grandchild(port: Port, pipe: Any) -> None:
    """``hold``, with a process of multiprocessing that outlives this one and answers at *pipe*."""
    context = multiprocessing.get_context("fork")
    context.Process(target=_answer, args=(pipe,)).start()
    hold(port)


def _answer(pipe: Any) -> None:
    pipe.recv()
    pipe.send("yes")
    os._exit(0)


def post_huge_when_told(port: Port, size: int) -> None:
    huge = bytes(size)
    port.post_message("ready")
    port.recv()
    port.post_message(huge)
    signal.pause()


def flood_with_checksums(port: Port) -> None:
    """Post (number, bytes of many sizes, checksum) until killed."""
    dice = random.Random(0)
    bodies = [dice.randbytes(dice.choice((10, 1000, 20_000, 200_000))) for _ in range(100)]
    sums = [zlib.crc32(body) for body in bodies]
    for number in range(1000):
        port.post_message((number, bodies[number % 100], sums[number % 100]))
    signal.pause()


def post_and_be_killed(port: Port, kind: str, number: int) -> None:
    """Post something, and die behind the very call."""
    if kind == "port":
        mine, moving = mpchannel.MessageChannel()
        mine.post_message(number)
        port.post_message(number, [moving])
    else:
        if kind in ("many", "huge body in overflow"):
            for each in range(1000):
                port.post_message(each)
        size = {"large": 300_000, "huge body in overflow": 3 << 20}.get(kind, 10)
        port.post_message((number, bytes(size)))
    os.kill(os.getpid(), signal.SIGKILL)


def count_and_sum(port: Port) -> None:
    """Receive numbers and large bytes until a text comes; post (how many, in order?, checksums)."""
    port.post_message("ready")
    numbers, checksums = [], []
    for message in port:
        if isinstance(message, int):
            numbers.append(message)
        elif isinstance(message, str):
            port.post_message((len(numbers), numbers == list(range(len(numbers))), checksums))
        else:
            checksums.append(zlib.crc32(message))


def anonymous_bytes_of(pid: int) -> int:
    """Bytes of anonymous memory that a process has descriptors of."""
    total = 0
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        try:
            if "memfd:" in os.readlink(path):
                total += os.stat(path).st_blocks * 512
        except OSError:
            continue  # closed meanwhile
    return total


# Messages one by one


def post_first_and_last_on_each_port(port: Port) -> None:
    """On each port that comes: post two messages and close at once."""
    for event in events_of(port):
        for received in event.ports:
            received.post_message("first")
            received.post_message("last")
            received.close()


def script_environment() -> dict[str, str]:
    """Variables for a program of its own that can import the package and the tests."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # for `tests`
    places = [os.path.dirname(_PACKAGE), here, os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}


def run_script(script: str, *options: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a program of its own that can import the package; its output is captured."""
    return subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=script_environment(),
        check=False,
    )


# Raw forks


def in_raw_child(fn: Callable[[], Any]) -> Any:
    """What *fn* returns in a child of ``os.fork``, or the text of its error."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            try:
                answer = ("returned", fn())
            except BaseException as error:  # noqa: BLE001  # raised again in the parent
                answer = ("raised", f"{type(error).__name__}: {error}")
            os.write(into, pickle.dumps(answer))
        finally:
            os._exit(0)
    os.close(into)
    with open(out, "rb") as file:
        data = file.read()
    ended, status = os.waitpid(pid, 0)
    if (ended, status) != (pid, 0):
        raise AssertionError(f"the forked child ended with status {status}")
    how, answer = pickle.loads(data)
    if how == "raised":
        raise AssertionError(f"in the forked child: {answer}")
    return answer


def open_descriptors() -> list[str]:
    """What the descriptors of this process stand for without inode numbers, sorted."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}").split(":[")[0])
        except OSError:
            continue  # the one that lists
    return sorted(found)


def open_sockets() -> int:
    """How many sockets this process holds."""
    return open_descriptors().count("socket")


def use_only_what_was_given(given: Port, forgotten: list[Any]) -> None:
    """Post what using each port of a list that came along by the fork gives."""
    for port in forgotten:
        try:
            port.post_message("from the wrong process")
            given.post_message("posted")
        except mpchannel.PortDetachedError as error:
            given.post_message(str(error))
    given.recv()


def report_all(port: Port, results: Port) -> None:
    """Post all that comes until the channel closes, as one message."""
    results.post_message(list(port))


# Signals


class Interrupted(Exception):
    """What the handler of a storm of signals raises."""


_PACKAGE = os.path.dirname(os.path.abspath(mpchannel.__file__))


@contextmanager
def storm(handler: Callable[[], Any] | None = None, interval: float = 0.001) -> Iterator[list[int]]:
    """A signal every *interval* seconds. The handler raises ``Interrupted`` out of whatever line of the package it
    interrupted, and nowhere else: what it interrupts in the test's own lines would be the test's own loss. With
    *handler*, that is called instead, on any line. Gives a list of one: how many times it came.
    """
    count = [0]
    handling: list[None] = []

    def come(_: int, frame: Any) -> None:
        if handler is not None:
            if not handling:  # a signal may come in the midst of its own handler
                handling.append(None)
                count[0] += 1
                handler()
                handling.clear()
        elif frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
            count[0] += 1
            raise Interrupted

    before = signal.signal(signal.SIGALRM, come)
    signal.setitimer(signal.ITIMER_REAL, interval, interval)
    try:
        yield count
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def receive_in_a_storm(port: Port, results: Port, way: str) -> None:
    """Receive until the close; post (messages, errors, reason of the close, times interrupted)."""
    take: Callable[[], Any] = getattr(port, way)
    got, errors, reason = [], [], None
    with storm() as interrupted:
        while reason is None:
            try:
                got.append(take())
            except Interrupted:
                continue
            except mpchannel.PortClosedError as error:
                reason = error.reason or "?"
            except Exception as error:  # noqa: BLE001  # reported
                errors.append(repr(error))
                if len(errors) > 100:
                    break
    if way == "receive":
        got = [(event.data, len(event.ports)) for event in got]
    results.post_message((got, errors[:5], reason, interrupted[0]))


def receive_ports_in_a_storm(port: Port, results: Port) -> None:
    """Like ``receive_in_a_storm``, for messages that are numbers, some of which carry a port, on which the number is
    posted back.
    """
    got, errors, reason = [], [], None
    with storm() as interrupted:
        while reason is None:
            try:
                event = port.receive()
                got.append(event)
            except Interrupted:
                continue
            except mpchannel.PortClosedError as error:
                reason = error.reason or "?"
            except Exception as error:  # noqa: BLE001  # reported
                errors.append(repr(error))
                if len(errors) > 100:
                    break
    for event in got:
        for each in event.ports:
            each.post_message(event.data)
    results.post_message(([(event.data, len(event.ports)) for event in got], errors[:5], reason, interrupted[0]))
    results.recv()


def post_in_a_storm(port: Port, results: Port, count: int, sizes: tuple[int, ...]) -> None:
    """Post (number, bytes, checksum); post the numbers whose post raised, and times interrupted."""
    dice = random.Random(0)
    uncertain, errors = [], []
    with storm() as interrupted:
        for number in range(count):
            body = dice.randbytes(dice.choice(sizes))
            message = (number, body, zlib.crc32(body))
            try:
                port.post_message(message)
            except Interrupted:
                uncertain.append(number)
            except Exception as error:  # noqa: BLE001  # reported
                errors.append(repr(error))
    results.post_message((uncertain, errors[:5], interrupted[0]))
    port.close()


def move_ports_in_a_storm(port: Port, results: Port, count: int) -> None:
    """Move ports, with their numbers posted ahead; post (those that stayed here, errors, times interrupted)."""
    stayed, errors = [], []

    def insist(fn: Callable[[], Any]) -> Any:
        while True:
            try:
                return fn()
            except Interrupted:
                continue

    with storm() as interrupted:
        for number in range(count):
            mine, moving = insist(lambda: tuple(mpchannel.MessageChannel()))
            while True:
                try:
                    port.post_message(number, [moving])
                    break
                except Interrupted:
                    if insist(lambda: moving.detached):  # noqa: B023  # called at once
                        break  # it went before the exception came
                except Exception as error:  # noqa: BLE001  # reported
                    errors.append(repr(error))
                    break
            if not insist(lambda: moving.detached):  # noqa: B023  # called at once
                stayed.append(number)
            insist(mine.close)
    results.post_message((stayed, errors[:5], interrupted[0]))
    port.close()


def post_from_a_handler_too(port: Port, results: Port, count: int) -> None:
    """Post numbers; a signal handler posts numbers of its own on the very port it interrupts."""
    by_handler = [0]

    def handler() -> None:
        port.post_message(("handler", by_handler[0], bytes(by_handler[0] % 5000)))
        by_handler[0] += 1

    with storm(handler):
        for number in range(count):
            port.post_message(("main", number, bytes(number % 3000)))
    port.close()
    results.post_message(by_handler[0])


def receive_in_a_handler_too(port: Port, results: Port) -> None:
    """Receive until the close; a signal handler receives from the very port it interrupts."""
    got, by_handler, errors, reason = [], [], [], None

    def handler() -> None:
        event = mpchannel.receive_message_on_port(port)
        if event is not None:
            by_handler.append(event.data)

    with storm(handler):
        while reason is None:
            try:
                got.append(port.recv())
            except mpchannel.PortClosedError as error:
                reason = error.reason or "?"
            except Exception as error:  # noqa: BLE001  # reported
                errors.append(repr(error))
                if len(errors) > 100:
                    break
    results.post_message((got, by_handler, errors[:5], reason))


def close_in_a_handler(results: Port, rounds: int, what: str) -> None:
    """A signal handler closes the very port it interrupts in posting or receiving; post how it all ended."""
    endings: dict[str, int] = {}
    dice = random.Random(0)
    for _ in range(rounds):
        near, far = mpchannel.MessageChannel()
        mine = near if what == "post" else far
        for number in range(600):
            near.post_message(number)
        try:
            with storm(mine.close, 0.0002 + dice.random() * 0.0005):
                if what == "post":
                    while near.post_message(bytes(dice.choice((1, 100, 3000)))):
                        pass
                    ending = "refused"
                else:
                    while True:
                        far.recv(20)
        except mpchannel.PortClosedError as error:
            ending = f"closed, {error.reason}"
        except Exception as error:  # noqa: BLE001  # reported
            ending = repr(error)
        endings[ending] = endings.get(ending, 0) + 1
        near.close()
        far.close()
    results.post_message(endings)


def wait_for_an_interrupt(port: Port) -> None:
    """Say "waiting", be interrupted in receive(), and say what came then."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        port.post_message("waiting")
        port.receive()
    except KeyboardInterrupt:
        port.post_message("interrupted")
    port.post_message(["after", port.recv()])


def pause_while_loading(message: Any) -> Any:
    """Loads as *message*, but waits for a signal first, where the test said so."""
    if PAUSES and PAUSES.pop():
        signal.pause()
    return message


PAUSES: list[bool] = []


class PausesWhile:
    """A message whose pickling or loading waits for a signal."""

    def __init__(self, when: str, message: Any) -> None:
        self.when, self.message = when, message

    def __reduce__(self) -> Any:
        if self.when == "pickling" and PAUSES and PAUSES.pop():
            signal.pause()
        return pause_while_loading, (self.message,)


# Programs that end


def post_and_end(port: Port, waiting: str) -> None:
    """Post "the last message" and return, while a listener or a thread is at work on the port."""
    if waiting == "a listener":
        port.onmessage = print
    elif waiting == "a thread in receive":
        about_to = threading.Event()

        def receive() -> None:
            about_to.set()
            port.receive()

        threading.Thread(target=receive, daemon=True).start()
        about_to.wait()
    port.post_message("the last message")


def teardown(port: Port, order: str, held: str) -> None:
    """The child's side of a program that ends in some order, with something held."""
    if held == "listeners":
        port.onclose = lambda event: None
    port.post_message("ready")
    try:
        while True:
            event = port.receive()
            if event.data == "end":
                if held == "overflow":
                    for number in range(1000):
                        port.post_message(number)
                return
    except mpchannel.PortClosedError:
        if order == "close and end":
            port.post_message("to a closed channel")


# The storm


@dataclass
class Juggled:
    """An end on its travels: what its holders posted and took so far."""

    name: int
    side: int
    posted: int = 0
    taken: int = 0


def body_of(number: int) -> bytes:
    size = 200_000 if number % 333 == 0 else 3000 if number % 50 == 0 else 64_000 if number % 4 == 0 else 8
    return number.to_bytes(8, "little") * (size // 8)


def stand_by(gate: Port, held: list[Port]) -> None:
    gate.post_message("ready")
    signal.pause()
    raise AssertionError(held)


def juggle(control: Port, mesh: list[Port], watched: list[Port], seed: int) -> None:
    """Post on, receive from and hand over the ends that come, at random, until told to stop; then send all back.

    With *watched* ports, be wild: collect, create, drop and close channels meanwhile, and tell how those closed.
    """
    dice = random.Random(seed)
    held: list[tuple[Juggled, Port]] = []
    stopped = False
    doors = [control, *mesh]
    while True:
        for door in list(doors):
            try:
                event = mpchannel.receive_message_on_port(door)
            except mpchannel.MessageError as error:
                control.post_message(("failure", repr(error)))
                continue
            if event is None:
                continue
            kind, what = event.data
            if kind == "an end":
                held.append((what, event.ports[0]))
            else:
                stopped = True
                reasons = [getattr(port.wait_closed(5), "reason", None) for port in watched]
                control.post_message(("stopped", reasons))
        if control.closed:
            return
        if stopped:
            while held:
                state, port = held.pop()
                control.post_message(("an end", state), [port])
            mpchannel.wait([door for door in doors if not door.closed], 1)
        elif not held:
            mpchannel.wait(doors, 0.05)
        else:
            _play(dice, held, control, mesh)
            if watched:
                _be_wild(dice)


def _play(dice: random.Random, held: list[tuple[Juggled, Port]], control: Port, mesh: list[Port]) -> None:
    place = dice.randrange(len(held))
    state, port = held[place]
    action = dice.random()
    if action < 0.45:
        for _ in range(dice.choice((1, 10, 60, 500))):
            port.post_message((state.posted, body_of(state.posted)))
            state.posted += 1
    elif action < 0.85:
        for _ in range(dice.choice((1, 10, 60, 700))):
            event = mpchannel.receive_message_on_port(port)
            if event is None:
                break
            number, body = event.data
            if number != state.taken or body != body_of(number):
                control.post_message(("failure", f"{state}: {number} came, with {len(body)} bytes"))
            state.taken = number + 1
    else:
        del held[place]
        dice.choice(mesh).post_message(("an end", state), [port])
        control.post_message(("handed over", 1))


def _be_wild(dice: random.Random) -> None:
    chance = dice.random()
    if chance < 0.1:
        gc.collect()
    elif chance < 0.4:
        near, far = mpchannel.MessageChannel()
        near.onclose = lambda event: None
        for _ in range(dice.choice((1, 400))):
            near.post_message("nobody reads this")
        inner, moving = mpchannel.MessageChannel()
        near.post_message("nor this", [moving])
        if chance < 0.2:
            far.close()
        elif chance < 0.3:
            cycle: list[Any] = [far, inner]
            cycle.append(cycle)
        else:
            far.onmessage = lambda event: None
            far.onclose = lambda event: None
            near.close()


# Pipes


def echo_until_eof(connection: Any, *others: Any) -> None:
    """Close the others, and send everything back until the end of file."""
    for each in others:
        each.close()
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        connection.send(message)


def send_in_turn(connection: Any, counter: Any, count: int) -> None:
    """Under the lock of a shared counter: count on, and send the number."""
    for _ in range(count):
        with counter.get_lock():
            connection.send((counter.value, bytes(counter.value % 300)))
            counter.value += 1
    connection.close()


def receive_in_turn(connection: Any, lock: Any, results: Any, count: int) -> None:
    got = []
    for _ in range(count):
        with lock:
            got.append(connection.recv()[0])
    results.send(got)


def send_all(connection: Any, *messages: Any) -> None:
    for each in messages:
        connection.send(each)


def wait_for_eof(connection: Any, *_held: Any) -> None:
    try:
        connection.recv()
    except EOFError:
        pass


def make_one_pair_and_talk(results: Any) -> None:
    mine, other = mpchannel.Pipe()
    mine.send("own")
    results.send(other.recv())


def make_a_pipe_and_send_it_away(port: Port, connection: Any) -> None:
    one, other = mpchannel.Pipe()
    port.post_message(one)
    connection.send(other)


GLOBAL_PIPE: list[Any] = []  # filled by a test before it forks


def send_through_a_global(message: Any) -> None:
    _send_through(message)


def _send_through(message: Any) -> None:
    GLOBAL_PIPE[0].send(message)


class SenderByMethod:
    """Its method uses a global that nothing else names."""

    def work(self) -> None:
        self.send()

    def send(self) -> None:
        GLOBAL_PIPE[0].send("by method")


def use_inherited(results: Any, number: int) -> None:
    """Whether a descriptor of the parent's is still the socket it was there."""
    try:
        kind = os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        kind = "nothing"
    results.send(kind)


# Start-up


def _cannot_be_loaded() -> None:
    raise LookupError("it cannot be loaded")


class CannotBeLoaded:
    def __reduce__(self) -> Any:
        return _cannot_be_loaded, ()


def exit_when_told(port: Port, code: int) -> None:
    port.recv()
    os._exit(code)


def identity(thing: Any) -> Any:
    return thing


def post_pid_on(port: Port) -> None:
    port.post_message(os.getpid())


def post_and_stay(port: Port, told: Port, what: str, count: int) -> None:
    for _ in range(count):
        moving = [] if what == "overflowed" else [mpchannel.MessageChannel().port1]
        port.post_message(moving or what, moving)
    told.post_message("posted")
    signal.pause()


def poll_slowly(connection: Any, gate: Port) -> None:
    """Poll without a lock until told to stop, with time between seeing that a file was read and leaving it."""
    real = _shared.take_off

    def slow(sock: Any) -> Any:
        time.sleep(random.random() * 0.004)
        return real(sock)

    _shared.take_off = slow
    gate.post_message("ready")
    while not gate.poll():
        connection.poll(0)
