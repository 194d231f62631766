"""Who runs listeners: the asyncio loop of the thread that started the port, or the process's one delivery thread.

A *home* waits on the sockets of its clients and gives each a turn when its socket has something. It holds a client
strongly only when told so; else it holds a weak reference, and a collected client is simply no longer there.

House rules: this room knows neither messages nor events. Any thread may call any function here, a finaliser too:
nothing waits for a lock that runs user code. The delivery thread is stopped before a fork and started again after it
in the parent; the child forgets it. At interpreter exit it is stopped first, then links say goodbye.
"""

from __future__ import annotations

import atexit
import heapq
import multiprocessing.process
import multiprocessing.util
import os
import select
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Final, Protocol, final

from . import _link
from ._end import OTHER_CORE, QUICK, SAME_CORE, SPIN, SWITCH_LEAST, SWITCH_MOST
from ._kernel import Bell, Socket, explain
from ._recycle import give_back, on_first

if TYPE_CHECKING:
    import asyncio

TURNS: Final = 64
"""Messages a client may dispatch in one turn, so that a busy port does not starve the others."""
_STOP_PATIENCE: Final = 1.0  # seconds a fork or exit waits for a listener that is running


class Client(Protocol):
    """Whoever is given turns."""

    def turn(self) -> None:
        """The socket has something (or had: a turn may come for nothing)."""


class Home(Protocol):
    def watch(self, sock: Socket, client: Client, *, keep: bool) -> None:
        """Give *client* turns while *sock* has something; *keep* it alive meanwhile. Again: change *keep*."""

    def unwatch(self, sock: Socket) -> None:
        """No more turns for now."""

    def forget(self, sock: Socket) -> None:
        """*sock* is being released."""

    def call(self, fn: Callable[[], None]) -> None:
        """Run *fn* soon."""

    def call_later(self, seconds: float, fn: Callable[[], None]) -> None:
        """Run *fn* after a while."""

    def report(self, error: BaseException, culprit: object) -> None:
        """An exception escaped a listener."""

    def run(self, results: list[Any]) -> None:
        """What listeners returned: coroutines, where the home can run them."""

    @property
    def here(self) -> bool:
        """Whether the calling thread is this home's own."""

    @property
    def usable(self) -> bool: ...


def home() -> Home:
    """The home for a port that starts in this thread, now."""
    loop = running_loop()
    return delivery_thread if loop is None else loop_home(loop)


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The asyncio loop that runs in this thread, without importing asyncio."""
    events = sys.modules.get("asyncio.events")
    return None if events is None else events._get_running_loop()


class _Entry:
    """A client as a home holds it."""

    __slots__ = ("client", "sock", "strong")

    def __init__(self, sock: Socket, client: Client, keep: bool) -> None:
        self.sock = sock
        self.client = weakref.ref(client)
        self.strong = client if keep else None

    def turn(self) -> None:
        client = self.client()
        if client is not None:
            client.turn()


@final
class _DeliveryThread:
    """The home of ports that are started where no asyncio loop runs."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # guards starting and stopping only
        self._entries: dict[int, _Entry] = {}
        self._calls: deque[Callable[[], None]] = deque()
        self._later: list[tuple[float, int, Callable[[], None]]] = []  # a heap
        self._epoll: select.epoll | None = None
        self._bell: Bell | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._hot = False  # the last message came quickly
        self._yielded = 0  # messages in a row that came at the first yield

    def watch(self, sock: Socket, client: Client, *, keep: bool) -> None:
        number = sock.fileno()
        epoll = self._running()
        known = self._entries.get(number)
        self._entries[number] = _Entry(sock, client, keep)
        if known is None:
            try:
                epoll.register(number, select.EPOLLIN)
            except OSError:
                del self._entries[number]
                raise

    def unwatch(self, sock: Socket) -> None:
        epoll = self._epoll
        if self._entries.pop(sock.fileno(), None) is not None and epoll is not None:
            epoll.unregister(sock)

    forget = unwatch

    def call(self, fn: Callable[[], None]) -> None:
        self._calls.append(fn)
        self._running()
        self._ring()

    def call_later(self, seconds: float, fn: Callable[[], None]) -> None:
        heapq.heappush(self._later, (time.monotonic() + seconds, id(fn), fn))
        self._running()
        self._ring()

    def report(self, error: BaseException, culprit: object) -> None:
        report(error)

    def run(self, results: list[Any]) -> None:
        for result in results:
            if hasattr(result, "__await__"):
                if hasattr(result, "close"):
                    result.close()  # or Python would warn that it was never awaited
                report(
                    TypeError(
                        "a coroutine listener needs an asyncio loop: start the port (start(), onmessage=...) in the "
                        "loop's thread while the loop runs"
                    )
                )

    @property
    def here(self) -> bool:
        return threading.current_thread() is self._thread

    @property
    def usable(self) -> bool:
        return True

    def _ring(self) -> None:
        bell = self._bell
        if bell is not None:
            bell.ring()

    def _running(self) -> select.epoll:
        """The epoll object, with the thread at work on it."""
        with self._lock:
            if self._epoll is None or self._bell is None:
                bell = Bell()
                try:
                    epoll = select.epoll()
                except OSError as error:
                    raise explain(error, "listen on a port") from error
                epoll.register(bell, select.EPOLLIN)
                self._bell, self._epoll = bell, epoll
            if self._thread is None and not self._stopping and not sys.is_finalizing():
                # A daemon: ports never keep a program alive.
                thread = threading.Thread(target=self._serve, name="mpchannel delivery", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    # From 3.12 on: the interpreter is shutting down. (Or the system has no thread to spare.)
                    if not _at_exit.begun and "shutdown" not in str(error):
                        raise
                else:
                    self._thread = thread
            return self._epoll

    def _serve(self) -> None:
        epoll, bell = self._epoll, self._bell
        assert epoll is not None
        assert bell is not None
        alarm = bell.fileno()
        while True:
            ready = self._ready(epoll)
            with self._lock:
                if self._stopping:
                    self._thread = None
                    return
            for number, _ in ready:
                if self._stopping:
                    break
                if number == alarm:
                    bell.hush()
                    for _ in range(len(self._calls)):
                        _guarded(self._calls.popleft())
                    continue
                entry = self._entries.get(number)
                client = None if entry is None else entry.client()
                if client is not None:
                    try:
                        client.turn()
                    except BaseException as error:
                        report(error)  # nobody above could; one client's trouble must not end the thread
            # While this thread sleeps, nothing here may keep open a socket that was moved away.
            entry = client = None
            while self._later and self._later[0][0] <= time.monotonic():
                _guarded(heapq.heappop(self._later)[2])

    def _ready(self, epoll: select.epoll) -> list[tuple[int, int]]:
        """Wait, as ``SocketEnd.next`` does: asking again and again for some 60 us if the last message came quickly,
        unless whoever sends seems to need this very core. (A thread that sleeps takes some 50 us to wake.)
        """
        if self._hot:
            until, yields = time.perf_counter() + SPIN, 0
            while time.perf_counter() < until:
                ready = epoll.poll(0)
                if ready:
                    self._yielded = self._yielded + 1 if yields == 1 else min(self._yielded, 0)
                    self._hot = self._yielded < SAME_CORE
                    return ready
                os.sched_yield()
                yields += 1
        began = time.perf_counter()
        ready = epoll.poll(max(0.0, self._later[0][0] - time.monotonic()) if self._later else None)
        took = time.perf_counter() - began
        if self._yielded < SAME_CORE:
            self._hot = took < QUICK
        elif not SWITCH_LEAST < took < SWITCH_MOST:
            self._hot, self._yielded = took < QUICK, -OTHER_CORE
        return ready

    def stop(self, patience: float) -> None:
        """End the thread, waiting for a listener that is running; it ends after that listener in any case."""
        with self._lock:
            thread = self._thread
            if thread is None or thread is threading.current_thread():
                return
            self._stopping = True
            self._ring()
        thread.join(patience)
        if not thread.is_alive():
            _await_end_of(thread)

    def catch_up(self, timeout: float | None = None) -> None:
        """Wait until what the thread was called for before has run, at most *timeout* seconds."""
        if self._thread is not None and not self.here:
            done = threading.Event()
            self.call(done.set)
            done.wait(timeout)

    @property
    def running(self) -> bool:
        return self._thread is not None

    @property
    def stopped(self) -> bool:
        return self._stopping

    def resume(self) -> None:
        """After ``stop``: go on."""
        with self._lock:
            if self._stopping:
                self._stopping = False
                self._ring()  # whoever saw the stop before left its calls
                self._running()

    def forget_parent(self) -> None:
        """In a forked child: the thread is not here, and the sockets it waited on are the parent's."""
        if self._epoll is not None and self._bell is not None:
            self._epoll.close()
            self._bell.close()
        self.__init__()


def _guarded(fn: Callable[[], None]) -> None:
    try:
        fn()
    except BaseException as error:
        report(error)  # nobody above could; one client's trouble must not end the thread


def _await_end_of(thread: threading.Thread) -> None:
    # join() returns when Python is done with a thread; the system may still count it for an instant, and a fork in
    # that instant would warn about threads (3.12 and later count what the system counts).
    path = f"/proc/self/task/{thread.native_id}"
    deadline = time.monotonic() + 0.1
    while os.path.exists(path) and time.monotonic() < deadline:
        os.sched_yield()


def report(error: BaseException) -> None:
    """Hand an exception that nobody can catch to ``threading.excepthook`` (default: a traceback on stderr)."""
    details = (type(error), error, error.__traceback__, threading.current_thread())
    try:
        threading.excepthook(threading.ExceptHookArgs(details))
    except BaseException:
        sys.excepthook(*sys.exc_info())  # as threading does; a hook must not end delivery


delivery_thread: Final = _DeliveryThread()


# asyncio


@final
class _LoopHome:
    """The home of ports that are started on an asyncio loop, and where coroutines wait for a socket."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)  # the loop's reader callbacks hold this object
        self._entries: dict[int, _Entry] = {}
        self._waiters: dict[int, list[asyncio.Future[None]]] = {}
        self._reading: dict[int, Socket] = {}  # what the loop was really told
        self._tasks: set[Any] = set()

    def watch(self, sock: Socket, client: Client, *, keep: bool) -> None:
        self._entries[sock.fileno()] = _Entry(sock, client, keep)
        self._update(sock)

    def unwatch(self, sock: Socket) -> None:
        if self._entries.pop(sock.fileno(), None) is not None:
            self._update(sock)

    def forget(self, sock: Socket) -> None:
        number = sock.fileno()
        self._entries.pop(number, None)
        self._update(sock)
        for waiter in tuple(self._waiters.pop(number, ())):  # the loop takes them off meanwhile
            self._soon(partial(_wake, waiter))

    def call(self, fn: Callable[[], None]) -> None:
        self._soon(fn)

    def call_later(self, seconds: float, fn: Callable[[], None]) -> None:
        loop = self._loop()
        if loop is not None:
            self._soon(partial(loop.call_later, seconds, fn))

    def report(self, error: BaseException, culprit: object) -> None:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise error  # as asyncio does: it ends the loop
        loop = self._loop()
        if loop is None:
            report(error)
        else:
            loop.call_exception_handler({"message": f"exception in listener {culprit!r}", "exception": error})

    def run(self, results: list[Any]) -> None:
        import asyncio

        for result in results:
            if hasattr(result, "__await__"):
                task = asyncio.ensure_future(result)
                self._tasks.add(task)
                task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Future[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.report(error, task.get_coro() if hasattr(task, "get_coro") else task)

    @property
    def here(self) -> bool:
        loop = self._loop()
        return loop is not None and running_loop() is loop

    @property
    def usable(self) -> bool:
        loop = self._loop()
        return loop is not None and not loop.is_closed()

    async def readable(self, link: _link.Link) -> None:
        """Wait until the link's socket has something, or is released."""
        loop, sock = self._loop(), link.watched_by(self)
        if loop is None or sock is None:
            return
        waiter, number = loop.create_future(), sock.fileno()
        waiters = self._waiters.setdefault(number, [])
        waiters.append(waiter)
        self._update(sock)
        sock = None  # an exception's traceback would keep it open after the port has moved away
        try:
            if link.open:  # else it was released while we were not yet known to wait
                await waiter
        finally:
            if waiter in waiters:
                waiters.remove(waiter)
            if not waiters and self._waiters.get(number) is waiters:
                del self._waiters[number]
            reading = self._reading.get(number)
            if reading is not None:
                self._update(reading)

    def _soon(self, fn: Callable[[], Any]) -> None:
        loop = self._loop()
        if loop is None or loop.is_closed():
            return
        try:
            loop.call_soon_threadsafe(fn)
        except RuntimeError:
            pass  # it was closed this very moment, and its readers with it

    def _update(self, sock: Socket) -> None:
        # The closure keeps *sock* open until the loop has dropped it, so its number cannot be somebody else's by then.
        if not self.usable:
            self.abandon()
        elif self.here:
            self._tell_loop(sock)
        else:
            self._soon(lambda: self._tell_loop(sock))

    def abandon(self) -> None:
        """The loop is over: keep no port alive and no socket open for it."""
        self._entries.clear()
        self._waiters.clear()
        self._reading.clear()
        self._tasks.clear()

    def _tell_loop(self, sock: Socket) -> None:
        loop, number = self._loop(), sock.fileno()
        if loop is None or loop.is_closed():
            return
        entry = self._entries.get(number)
        mine = entry is not None and entry.sock is sock
        if mine or self._waiters.get(number):
            if self._reading.get(number) is not sock:
                self._reading[number] = sock
                loop.add_reader(number, self._turn, number)
        elif self._reading.get(number) is sock:
            del self._reading[number]
            loop.remove_reader(number)

    def _turn(self, number: int) -> None:
        waiters = self._waiters.get(number)
        if waiters:
            for waiter in waiters:
                _wake(waiter)
            waiters.clear()
            self._update(self._reading[number])
        entry = self._entries.get(number)
        if entry is not None:
            entry.turn()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


_loops: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopHome] = weakref.WeakKeyDictionary()


def loop_home(loop: asyncio.AbstractEventLoop) -> _LoopHome:
    """The one home on this loop. Called in the loop's thread."""
    found = _loops.get(loop)
    if found is None:
        for each, ended in list(_loops.items()):
            if each.is_closed():  # listeners may refer to it, which would keep all of them for ever
                ended.abandon()
                del _loops[each]
        _loops[loop] = found = _LoopHome(loop)
    return found


# Memory that is not used again


def _give_back_in_time() -> None:
    """Where this process waits anyway, have it look at the memory of large messages. No thread is started for it."""
    if running_loop() is not None or delivery_thread.running:
        _give_back(home())


def _give_back(place: Home) -> None:
    due = give_back()
    if due is not None:
        place.call_later(due, partial(_give_back, place))


on_first.append(_give_back_in_time)


# Fork and exit


def before_fork() -> None:
    delivery_thread.stop(_STOP_PATIENCE)


def after_fork_in_parent(caller: FrameType) -> None:
    """*caller*: whoever called ``os.fork``."""
    if not delivery_thread.stopped:
        return
    if sys.version_info >= (3, 12):
        _when_continues(caller, delivery_thread.resume)
    else:
        delivery_thread.resume()


def _when_continues(caller: FrameType, fn: Callable[[], None]) -> None:
    """Run *fn* when *caller* executes its next instruction.

    Python (3.13.0 for one) counts threads after the at-fork hooks and warns about forking with threads: a thread that
    a hook starts is counted. So it is started one instruction later, by way of ``sys.monitoring``.
    """
    monitoring = sys.monitoring  # type: ignore[attr-defined,unused-ignore]
    tool = next((each for each in (3, 4) if monitoring.get_tool(each) is None), None)
    if tool is None:
        fn()
        return
    forking, code, events = threading.get_ident(), caller.f_code, monitoring.events

    def proceed(*_: object) -> None:
        if threading.get_ident() == forking:
            monitoring.set_local_events(tool, code, 0)
            monitoring.set_events(tool, 0)
            for event in (events.INSTRUCTION, events.RAISE):
                monitoring.register_callback(tool, event, None)
            monitoring.free_tool_id(tool)
            fn()

    try:
        monitoring.use_tool_id(tool, "mpchannel")
    except ValueError:  # another thread that forks was faster
        fn()
        return
    for event in (events.INSTRUCTION, events.RAISE):
        monitoring.register_callback(tool, event, proceed)
    monitoring.set_local_events(tool, code, events.INSTRUCTION)
    monitoring.set_events(tool, events.RAISE)  # the fork itself may have failed


def after_fork_in_child() -> None:
    delivery_thread.forget_parent()
    _loops.clear()


def say_goodbye() -> None:
    """This process ends in order: stop dispatching, then tell the other ends of all its links."""
    _at_exit.begun = True
    delivery_thread.stop(_STOP_PATIENCE)
    _link.say_goodbye()


class _AtExit:
    """What multiprocessing calls in a child when its target returned. (It ends children without ``atexit``.)"""

    begun = False

    def arm(self) -> None:
        # Before multiprocessing joins this process's own children: they may wait for our ports to close.
        multiprocessing.util.Finalize(None, _say_goodbye_unless_threads, exitpriority=0)


def _say_goodbye_unless_threads() -> None:
    others = [each for each in threading.enumerate() if each is not threading.current_thread() and not each.daemon]
    if not others:
        say_goodbye()


_at_exit = _AtExit()
# Registered after multiprocessing's own handler, which joins children, so it runs before that one.
atexit.register(say_goodbye)
multiprocessing.util.register_after_fork(_at_exit, _AtExit.arm)
if multiprocessing.process.parent_process() is not None or hasattr(
    multiprocessing.process.current_process(), "_inheriting"
):
    _at_exit.arm()  # a child that meets this package only while it runs, or while it loads what it was given
