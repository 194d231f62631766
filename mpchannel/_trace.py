"""A trace: what the messages of a program do, in all its processes, as Chrome trace events (to be seen in Perfetto).

Nothing of this costs anything while nobody traces: methods are exchanged for the time of a trace. Each process appends
its events to one spool file, a line by one call, so what a killed process did stays. Nothing is added to messages: who
posted which is found out at the end. An end has one holder at a time and loses or doubles nothing, so the n-th message
taken at one end is the n-th that was posted at the other, whoever held them. (Of a channel that is older than the
trace, messages that were queued at its beginning are taken for later ones.)

The format: "Trace Event Format" of the Chromium project, JSON object form; times in microseconds of the monotonic
clock, which is the same for all processes.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing.process
import multiprocessing.util
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final, Self, final

from ._delivery import delivery_thread
from ._end import SocketEnd
from ._endpoint import Endpoint, State
from ._wire import End
from .channel import MessageChannel
from .errors import MessageError
from .port import MessagePort

__all__ = ["trace"]

VARIABLE: Final = "MPCHANNEL_TRACE"
"""Environment: trace the program from its beginning to its end, into that file."""
_PATIENCE: Final = 1.0  # seconds that the end of a trace waits for a listener that is running
_SPOOL: Final = "MPCHANNEL_TRACE_SPOOL"  # environment of a traced program's processes: where they append their events


@final
class trace:
    """Record what messages do, in this process and in those that are started meanwhile, and write it to a file.

    ``with mpchannel.trace("run.json"): ...``; or set ``MPCHANNEL_TRACE=run.json`` for a whole program. Open the file in
    Perfetto, or ``python -m mpchannel trace run.json``. It has slices for posting, receiving and each listener's run,
    instants for channels made, transfers and closes, and an arrow from each post to where its message was taken.

    *path*: the file to write, when the block is left; until then there is a file of that name with ``.part`` behind,
    which is left if this process is killed, and can be looked at as well. Processes that were started before are not
    recorded. Raises ``OSError`` if the file cannot be written, ``RuntimeError`` if a trace is being recorded already.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.path.abspath(os.fspath(path))

    def __enter__(self) -> Self:
        if _recorder is not None:
            raise RuntimeError(f"a trace is being recorded already, into {_recorder.spool}")
        open(self._path, "a").close()  # better now than when all is over
        spool = self._path + ".part"
        with open(spool, "w") as file:
            file.write("[\n")
        os.environ[_SPOOL] = spool
        _begin(spool)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        recorder = _recorder
        if recorder is None or os.environ.pop(_SPOOL, None) is None:
            return  # a forked child leaves the block of its parent
        _end()
        spool = recorder.spool
        with open(spool) as lines, open(self._path, "w") as file:
            json.dump({"displayTimeUnit": "ms", "traceEvents": connected(events_of(lines))}, file)
        os.remove(spool)


def from_environment() -> None:
    """As the environment says: append to the trace of the program that started this process, or begin one."""
    spool, path = os.environ.get(_SPOOL), os.environ.get(VARIABLE)
    if spool:
        follow(spool)
    elif path and _recorder is None:
        whole = trace(path)
        whole.__enter__()
        # The last thing of all: behind the goodbyes of ports, and the end of children.
        multiprocessing.util.Finalize(None, whole.__exit__, (None, None, None), exitpriority=-100)


def spool_of_trace() -> str | None:
    """For processes that do not inherit the environment: where they are to append to."""
    return None if _recorder is None else _recorder.spool


def follow(spool: str) -> None:
    """In a child of a traced program. The trace may be over by now."""
    if _recorder is None and os.path.exists(spool):
        os.environ[_SPOOL] = spool
        _begin(spool)


class _Recorder:
    def __init__(self, spool: str) -> None:
        self.spool = spool
        self._file = os.open(spool, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._lock = threading.RLock()  # a signal handler may post
        self._pid = 0
        self._threads: set[int] = set()
        self.exchanged: list[tuple[type, str, Any]] = []

    def add(self, event: dict[str, Any]) -> None:
        pid, thread = os.getpid(), threading.get_native_id()
        lines = [event]
        if pid != self._pid:
            self._pid = pid
            self._threads = set()
            self._lock = threading.RLock()  # a forked child's may be held by a thread that is not here
            name = multiprocessing.process.current_process().name
            lines.append({"ph": "M", "name": "process_name", "args": {"name": f"{name}, pid {pid}"}})
        if thread not in self._threads:
            self._threads.add(thread)
            lines.append({"ph": "M", "name": "thread_name", "args": {"name": threading.current_thread().name}})
        text = "".join(json.dumps(each | {"pid": pid, "tid": thread}) + ",\n" for each in lines)
        with self._lock:
            if self._file >= 0:
                os.write(self._file, text.encode())

    def slice(self, name: str, port: Endpoint, begin: float, what: tuple[str, float] | None, **about: Any) -> None:
        """*what*: ``posted`` or ``taken``, and when: the message is connected by that."""
        about["port"] = port._identity
        event = {
            "ph": "X",
            "name": name,
            "cat": "message",
            "ts": begin,
            "dur": max(_now() - begin, 0.001),
            "args": about,
        }
        if what is not None:
            event["what"] = (*what, port._link.channel.hex(), port._link.side)
        self.add(event)

    def instant(self, name: str, **about: Any) -> None:
        self.add({"ph": "i", "s": "t", "name": name, "cat": "channel", "ts": _now(), "args": about})

    def close(self) -> None:
        with self._lock:
            number, self._file = self._file, -1
            os.close(number)


_recorder: _Recorder | None = None


def _now() -> float:
    return time.monotonic_ns() / 1000


# Exchanged methods


def _begin(spool: str) -> None:
    global _recorder
    _recorder = recorder = _Recorder(spool)
    for owner, name, wrap in _WRAPPERS:
        original = vars(owner)[name]
        recorder.exchanged.append((owner, name, original))
        setattr(owner, name, wrap(original, recorder))


def _end() -> None:
    global _recorder
    if _recorder is not None:
        for owner, name, original in _recorder.exchanged:
            setattr(owner, name, original)
        delivery_thread.catch_up(_PATIENCE)  # with the listener that it runs
        _recorder.close()
        _recorder = None


class _Here(threading.local):
    size = 0  # bytes of the packet that was posted last
    inside = False  # a method that is recorded already


_here = _Here()

Method = Callable[..., Any]


def _sized(original: Method, recorder: _Recorder) -> Method:
    def post(link: SocketEnd, data: bytes) -> Any:
        _here.size = len(data)
        return original(link, data)

    return post


def _sized_parts(original: Method, recorder: _Recorder) -> Method:
    def post_parts(link: SocketEnd, parts: Any, size: int, *rest: Any) -> Any:
        _here.size = size
        return original(link, parts, size, *rest)

    return post_parts


def _posting(original: Method, recorder: _Recorder) -> Method:
    def post(port: MessagePort[Any, Any], *arguments: Any, **options: Any) -> Any:
        begin, accepted = _now(), False
        _here.size = 0
        try:
            result = original(port, *arguments, **options)
            accepted = result is not False
        finally:
            what = ("posted", begin) if accepted else None
            recorder.slice("post", port, begin, what, bytes=_here.size, accepted=accepted)
        return result

    return post


def _taking(original: Method, recorder: _Recorder) -> Method:
    def take(port: MessagePort[Any, Any], *arguments: Any, **options: Any) -> Any:
        if _here.inside:
            return original(port, *arguments, **options)
        begin, got = _now(), False
        _here.inside = True
        try:
            result = original(port, *arguments, **options)
            got = True
        except MessageError:
            got = True  # it was taken, and could not be loaded
            raise
        finally:
            _here.inside = False
            recorder.slice("receive", port, begin, ("taken", _now()) if got else None)
        return result

    return take


def _looking(original: Method, recorder: _Recorder) -> Method:
    def receive_now(port: MessagePort[Any, Any]) -> Any:
        begin = _now()
        result = original(port)
        if result is not None:
            recorder.slice("receive", port, begin, ("taken", _now()))
        return result

    return receive_now


def _taking_later(original: Method, recorder: _Recorder) -> Method:
    async def take(port: MessagePort[Any, Any]) -> Any:
        got = False
        try:
            result = await original(port)
            got = True
        except MessageError:
            got = True
            raise
        finally:
            if got:
                begin = _now()
                recorder.slice("receive", port, begin, ("taken", begin))
        return result

    return take


def _dispatching(original: Method, recorder: _Recorder) -> Method:
    def deliver(port: Endpoint, taken: Any, *rest: Any) -> Any:
        if isinstance(taken, End):
            return original(port, taken, *rest)
        begin = _now()
        try:
            return original(port, taken, *rest)
        finally:
            recorder.slice("dispatch", port, begin, ("taken", begin))

    return deliver


def _closing(original: Method, recorder: _Recorder) -> Method:
    def close(port: Endpoint) -> None:
        if port._state is State.OPEN:
            recorder.instant("close", port=port._identity)
        original(port)

    return close


def _ending(original: Method, recorder: _Recorder) -> Method:
    def over(port: Endpoint, end: End, *rest: Any, **options: Any) -> Any:
        if port._state is State.OPEN:
            recorder.instant("closed by the other end", port=port._identity, reason=end.reason, by=end.pid)
        return original(port, end, *rest, **options)

    return over


def _leaving(original: Method, recorder: _Recorder) -> Method:
    def left(port: Endpoint, departure: Any, pid: int | None, *rest: Any, **options: Any) -> Any:
        result = original(port, departure, pid, *rest, **options)
        recorder.instant("transfer", port=port._identity, to=pid)
        return result

    return left


def _making(original: Method, recorder: _Recorder) -> Method:
    def __init__(channel: MessageChannel[Any, Any], **options: Any) -> None:
        original(channel, **options)
        recorder.instant("channel", port=channel.port1._identity)

    return __init__


_WRAPPERS: Final[tuple[tuple[type, str, Callable[[Method, _Recorder], Method]], ...]] = (
    (MessageChannel, "__init__", _making),
    (MessagePort, "post_message", _posting),
    (MessagePort, "send", _posting),
    (MessagePort, "send_bytes", _posting),
    (MessagePort, "recv", _taking),
    (MessagePort, "receive", _taking),
    (MessagePort, "_next_bytes", _taking),
    (MessagePort, "_receive_now", _looking),
    (MessagePort, "areceive", _taking_later),
    (Endpoint, "_deliver", _dispatching),
    (Endpoint, "close", _closing),
    (Endpoint, "_over", _ending),
    (Endpoint, "_left", _leaving),
    (SocketEnd, "post", _sized),
    (SocketEnd, "post_parts", _sized_parts),
)


# At the end


def events_of(lines: Iterator[str]) -> list[dict[str, Any]]:
    """The events of a spool file, which may end in the midst of one."""
    events = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # the bracket; a line for which the disk had no room
            event = json.loads(line.rstrip().rstrip(","))
            if isinstance(event, dict):
                events.append(event)
    return events


def connected(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events, with an arrow from each post to where its message was taken."""
    ends: dict[tuple[str, str, int], list[tuple[float, dict[str, Any]]]] = defaultdict(list)
    for event in events:
        if what := event.pop("what", None):
            kind, when, channel, side = what
            ends[kind, channel, side].append((when, event))
    arrows: list[dict[str, Any]] = []
    for (kind, channel, side), takes in ends.items():
        if kind != "taken":
            continue
        posts = sorted(ends.get(("posted", channel, 3 - side), ()), key=lambda each: each[0])
        waiting = iter(posts)
        post = next(waiting, None)
        for when, take in sorted(takes, key=lambda each: each[0]):
            if post is None or post[0] > when:
                continue  # posted before the trace began
            common = {"name": "message", "cat": "message", "id": len(arrows) // 2 + 1}
            arrows.append(common | {"ph": "s", "ts": post[0], "pid": post[1]["pid"], "tid": post[1]["tid"]})
            inside = min(when, take["ts"] + take["dur"] - 0.001)
            arrows.append(common | {"ph": "f", "bp": "e", "ts": inside, "pid": take["pid"], "tid": take["tid"]})
            take["args"]["waited"] = f"{when - post[0]:.1f} us"
            post = next(waiting, None)
    return sorted(events + arrows, key=lambda event: event.get("ts", 0.0))
