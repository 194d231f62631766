"""``WorkerPool``: a ``concurrent.futures.Executor`` of workers and ports alone.

    caller                       delivery thread                    worker
    submit -> an idle worker?    <-- done, failed, report --------- parent_port(): one task at a time
              its port: task -----------------------------------------> fn(*args, **kwargs)
              none: waiting      --- the next that waits ------------->
    cancel, timeout --------------- control: the task's number ------> cancelled(), asked there

A worker runs one task at a time, and is given more only while tasks are so short that the way there and back is most
of the time. What it has begun is known at any moment, and the rest can be taken back (``_claims``). So whatever ends a
worker, a kill of ours too, hits the task that runs and no other, and a long one holds up nobody; and no lock, queue or
semaphore is shared between processes that a dead one could hold.

House rules: ``lock`` guards who has what; futures are settled, and callbacks run, outside of it. Results are heard on
the delivery thread, also if the pool is used from an asyncio loop: ``result()`` may then block that loop, but not the
pool.
"""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import count, islice
from typing import Any, Final, ParamSpec, TypeVar, final

from . import _clone
from ._claims import Claims
from ._delivery import delivery_thread, report
from ._failure import Packed, unpack_error
from ._stream import Stream
from ._task import BROKEN, DONE, READY, REPORT, run_chunk, serve
from .channel import MessageChannel
from .context import default_context
from .errors import PortClosedError, WorkerDied, WorkerStartError
from .events import CloseEvent, MessageErrorEvent, MessageEvent
from .port import MessagePort
from .worker import Worker, _in_words, _left

__all__ = ["PoolFuture", "PoolStream", "WorkerPool"]

P = ParamSpec("P")
T = TypeVar("T")
AnyPort = MessagePort[Any, Any]

_AHEAD: Final = 0.002  # seconds of work that a worker is given ahead
_MOST_AHEAD: Final = 64  # calls
_STILLBORN: Final = 3  # workers in a row that ended before they were ready: then the pool is broken
_SMALL: Final = 16 * 1024  # bytes of a call that goes together with others
_cancelling: Final = threading.Lock()


class PoolFuture(concurrent.futures.Future[T]):
    """A call's future: as ``concurrent.futures.Future``, and awaitable. ``cancel()`` also stops a call that runs: it is
    asked to end (``cancelled()`` is true in it), and its worker is replaced after the pool's ``grace``.
    """

    def __init__(self, pool: WorkerPool, fn: Any, task: Any, options: _Options) -> None:
        super().__init__()
        self._pool: WorkerPool | None = pool
        self._name = getattr(fn, "__qualname__", None) or repr(fn)
        self._task: Any = task  # packed
        self._moves = isinstance(task, _clone.Pickled) and not all(each._shared for each in task.objects)
        """Whether its ports leave with the first try."""
        self._alone = not isinstance(task, bytes) or len(task) > _SMALL  # it goes by itself to a worker without a task
        self._timeout, self._retries, self._on_progress = options._timeout, options._retries, options._on_progress
        self._seat: _Seat | None = None
        self._number = 0  # its worker's, for it
        self._cancelling = False

    def running(self) -> bool:
        pool = self._pool
        if pool is None:
            return False
        with pool._lock:
            return self._seat is not None and self._seat.first is self and not self.done()

    def cancel(self) -> bool:
        """Whether it is cancelled: ``False`` only if it was done before."""
        with _cancelling:
            first, self._cancelling = not self._cancelling, True
        try:
            if first and super().cancel():
                self.set_running_or_notify_cancel()
        finally:  # whatever callbacks raise
            if self.cancelled():
                self._stop()
        return self.cancelled() or not self.done()

    def _stop(self) -> None:
        """Nobody waits for it any more."""
        pool = self._pool
        if pool is not None:
            pool._abandon(self)
        self._task = None

    def result(self, timeout: float | None = None) -> T:
        """As ``concurrent.futures.Future.result``. ``RuntimeError`` where it would wait for itself."""
        self._check_waiting()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As ``concurrent.futures.Future.exception``. ``RuntimeError`` where it would wait for itself."""
        self._check_waiting()
        return super().exception(timeout)

    def _check_waiting(self) -> None:
        if not self.done() and delivery_thread.here:
            raise RuntimeError(
                "this would wait for itself: results are heard in this thread, which runs callbacks of futures and "
                "listeners; use add_done_callback, or another thread"
            )

    def _settle(self, result: Any = None, error: BaseException | None = None) -> None:
        self._pool = self._task = None
        try:
            if error is None:
                self.set_result(result)
            else:
                self.set_exception(error)
        except concurrent.futures.InvalidStateError:
            pass  # cancelled, or out of time, this very moment
        except KeyboardInterrupt:
            raise
        except BaseException as escaped:  # of a callback; others wait for what comes behind this
            report(escaped)

    def __await__(self) -> Generator[Any, None, T]:
        import asyncio

        return asyncio.wrap_future(self).__await__()


@final
class _Seat:
    """A worker of a pool, and the calls that it was given: the first is the one that runs, if it has begun."""

    def __init__(self, pool: WorkerPool, worker: Worker, claims: Claims, control: AnyPort) -> None:
        self.pool = weakref.ref(pool)
        self.worker = worker
        self.claims = claims
        self.control = control
        self.ready = False
        self.calls: dict[int, PoolFuture[Any]] = {}  # by number, in their order
        self.number = 0  # the latest
        self.count = 0  # of calls that it was given and that were not taken back
        self.leaving = False  # it gets no more
        self.pace = _AHEAD  # seconds that a call takes here, of late
        self.posted: list[int] = []  # filled by the very call that posts the latest ones
        self._since = 0.0  # when the first became the first

    def listen(self) -> None:
        port = self.worker._port
        port._set_handler("message", self.heard)
        port._set_handler("messageerror", self.misheard)
        port._set_handler("close", self.ended)
        port._start_at(delivery_thread)

    @property
    def first(self) -> PoolFuture[Any] | None:
        return next(iter(self.calls.values()), None)

    @property
    def depth(self) -> int:
        """Calls that it should have: more than one only if they are short."""
        return max(1, min(_MOST_AHEAD, int(_AHEAD / self.pace)))

    def give(self, calls: list[PoolFuture[Any]]) -> bool:
        """``False`` if the worker is gone. Raises ``DataCloneError`` if a port in one was moved or closed meanwhile,
        ``OSError`` at a limit.
        """
        numbers = range(self.number + 1, self.number + 1 + len(calls))
        self.number += len(calls)
        self.count += len(calls)
        posted: list[int] = []
        self.posted = posted
        first = not self.calls
        for number, call in zip(numbers, calls, strict=True):  # first of all: an answer may be here at once
            self.calls[number], call._seat, call._number = call, self, number
        try:
            self.claims.give(numbers)
            port = self.worker._port
            if calls[0]._alone:  # it is loaded once it has begun: it may be what ends the worker
                given = port.post_message([(numbers[0], None)])
                given = given and port._post(calls[0]._task, "given to a worker", posted)
            else:
                given = port._post(_clone.pack([(call._number, call._task) for call in calls]), sent=posted)
        except Exception:
            self._stand_in(calls)
            self._withdraw(numbers)
            raise
        if not given:
            self._withdraw(numbers)
        if first:
            self.begin()
        return given

    def _stand_in(self, calls: list[PoolFuture[Any]]) -> None:
        """An exception came before the task was posted that may have been announced: nothing to do comes in its place.
        (If it was not, that is nothing to do at all.)
        """
        if calls and calls[0]._alone and not self.posted:
            self.worker._port.post_message(())

    def recover(self, calls: list[PoolFuture[Any]]) -> list[PoolFuture[Any]]:
        """A signal handler raised while *calls* were given: those, and others here, that have not begun."""
        self._stand_in(calls)
        back = self.take_back()
        for call in calls:
            if call._seat is self and not self.posted:  # nobody can begin it, even if its token is gone: see claim()
                self.calls.pop(call._number, None)
                self.count -= 1
                call._seat = None
            if call._seat is None and call not in back:
                back.append(call)
        return back

    def _withdraw(self, numbers: Iterable[int]) -> None:
        """They were not posted. (Their tokens stay there: nobody has a task of that number.)"""
        for number in numbers:
            call = self.calls.pop(number, None)
            if call is not None:
                call._seat = None
                self.count -= 1

    def take_back(self) -> list[PoolFuture[Any]]:
        """Those that have not begun, and now never will here."""
        back = [self.calls.pop(number) for number in sorted(self.claims.take_back()) if number in self.calls]
        self.count -= len(back)
        for call in back:
            call._seat = None
        return back

    def begin(self) -> None:
        """The time of the first call begins, if the worker has begun itself."""
        call = self.first
        self._since = time.monotonic()
        if self.ready and call is not None and call._timeout is not None:
            expire = partial(_expire, weakref.ref(call), weakref.ref(self), call._number)
            delivery_thread.call_later(call._timeout, expire)

    def leave(self) -> None:
        self.leaving = True
        self.worker._port.post_message(None)

    def heard(self, event: MessageEvent[Any]) -> None:
        kind, number, value = event.data
        del event
        if kind == REPORT:
            call = self.calls.get(number)
            if call is not None and call._on_progress is not None and not call.done():
                call._on_progress(*value)
        elif kind == READY:
            pool = self.pool()
            with self._locked():
                self.ready = True
                self.begin()
                if pool is not None:
                    pool._stillborn = 0
        elif kind == BROKEN:
            pool = self.pool()
            if pool is not None:
                error = WorkerStartError(f"the initializer failed in {self.worker.name}: {value[1].splitlines()[-1]}")
                pool._break(error, value)
        else:
            self.free(number, value, None if kind == DONE else unpack_error(value))

    def misheard(self, event: MessageErrorEvent) -> None:
        with self._locked():
            number = next(iter(self.calls), 0)
        self.free(number, None, event.error)

    def free(self, number: int, result: Any, error: BaseException | None) -> None:
        """A call was answered."""
        with self._locked():
            call = self.calls.pop(number, None)
            if call is None:
                return
            call._seat = None
            took = time.monotonic() - self._since
            self.pace = max(took, (self.pace + took) / 2, 1e-6)  # slow down at once
            self.begin()
        pool = self.pool()
        if pool is not None:
            pool._next(self)  # before callbacks run, so that the worker is at work meanwhile
        call._settle(result, error)

    def _locked(self) -> AbstractContextManager[Any]:
        pool = self.pool()
        return nullcontext() if pool is None else pool._lock

    def ended(self, _: CloseEvent) -> None:
        self.control.close()
        pool = self.pool()
        if pool is not None:
            pool._lost(self)


class _Options:
    """How calls are made: ``pool.options(timeout=5).submit(fn, ...)``."""

    def __init__(
        self,
        pool: WorkerPool,
        timeout: float | None,
        retries: int,
        on_progress: Callable[[float, float | None, str], Any] | None,
    ) -> None:
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be seconds above 0, or None, not {timeout!r}")
        if not isinstance(retries, int) or retries < 0:
            raise ValueError(f"retries must be a number of times, 0 or more, not {retries!r}")
        if on_progress is not None and not callable(on_progress):
            raise TypeError(f"on_progress must be callable or None, not {on_progress!r}")
        self._pool = pool
        self._timeout = timeout
        self._retries = retries
        self._on_progress = on_progress

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> PoolFuture[T]:
        """As ``WorkerPool.submit``."""
        return self._pool._submit(fn, args, kwargs, self)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """As ``WorkerPool.map``."""
        return self._pool._map(fn, iterables, timeout, chunksize, buffersize, self)

    def stream(self, fn: Callable[P, Iterable[T]], /, *args: P.args, **kwargs: P.kwargs) -> PoolStream[T]:
        """As ``WorkerPool.stream``."""
        return PoolStream(self._pool, fn, args, kwargs, self)


pools: Final[weakref.WeakSet[WorkerPool]] = weakref.WeakSet()
"""For who looks inside."""


class WorkerPool(concurrent.futures.Executor):
    """Workers that run calls, *max_workers* at a time (default: the cores this process may use).

    *initializer* is called with *initargs* in each worker before its first call; if it fails, so do all calls. (In a
    notebook, functions travel with the globals that they use: have it keep its state in a class, not in a global.)
    A worker ends after *max_tasks_per_child* calls, and a new one takes its place. *grace*: seconds that a call which
    was cancelled, or has run out of time, is given to end by itself before its worker is replaced. *context*: a context
    of ``get_context`` or the name of a start method. *name* is what workers are named after.

    A worker that dies fails the call it had, with ``WorkerDied``, and no other; the pool goes on. Ports among arguments
    and results move. Workers start when they are first needed, and end with ``shutdown()``, or with the program.

    Raises ``ValueError`` for a number that cannot be, ``TypeError`` if *initializer* is not callable.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        context: Any = None,
        initializer: Callable[..., Any] | None = None,
        initargs: tuple[Any, ...] = (),
        max_tasks_per_child: int | None = None,
        grace: float = 1.0,
        name: str = "Pool",
    ) -> None:
        for number, label in ((max_workers, "max_workers"), (max_tasks_per_child, "max_tasks_per_child")):
            if number is not None and (not isinstance(number, int) or number <= 0):
                raise ValueError(f"{label} must be a number above 0, or None, not {number!r}")
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be callable or None, not {initializer!r}")
        if not grace >= 0:
            raise ValueError(f"grace must be seconds, 0 or more, not {grace!r}")
        if context is None or isinstance(context, str):
            context = default_context.get_context(context)
        self._context = context
        self._max_workers = max_workers or len(os.sched_getaffinity(0))
        self._initializer = initializer
        self._initargs = tuple(initargs)
        self._max_tasks = max_tasks_per_child
        self._grace = grace
        self._name = name
        self._numbers = count(1)
        self._lock = threading.RLock()
        self._stillborn = 0  # workers that ended before they were ready, since one was
        self._waiting: deque[PoolFuture[Any]] = deque()
        self._seats: list[_Seat] = []
        self._idle: list[_Seat] = []
        self._starting = 0  # workers that are not among the seats yet
        self._broken: tuple[str, Packed | None] | None = None
        self._shut = False
        self._plain = _Options(self, None, 0, None)
        self._plain._pool = weakref.proxy(self)  # else a cycle
        weakref.finalize(self, _dismiss, self._seats).atexit = False
        pools.add(self)

    # What users type

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> PoolFuture[T]:
        """Have a worker call ``fn(*args, **kwargs)``. The arguments are copied in this call (large arrays when a worker
        takes them).

        Raises ``DataCloneError`` for what cannot be sent, with the path to it; ``WorkerStartError`` if workers cannot
        begin; ``RuntimeError`` after ``shutdown()``.
        """
        return self._submit(fn, args, kwargs, self._plain)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """The results of *fn* for the items of *iterables*, in order. Lazy: at most *buffersize* calls (default: 8 for
        each worker) of *chunksize* items are ahead of the reader. ``TimeoutError`` if a result is not there *timeout*
        seconds after the call of ``map``. Closing the iterator cancels what is left.
        """
        return self._map(fn, iterables, timeout, chunksize, buffersize, self._plain)

    def stream(self, fn: Callable[P, Iterable[T]], /, *args: P.args, **kwargs: P.kwargs) -> PoolStream[T]:
        """The values of the generator function *fn*, called with *args* and *kwargs*, as they come: for ``for`` and
        ``async for``. It is at most 64 values ahead
        of its reader. ``close()`` stops it, and its ``finally`` runs; so does leaving ``with``.
        """
        return PoolStream(self, fn, args, kwargs, self._plain)

    def options(
        self,
        *,
        timeout: float | None = None,
        retries: int = 0,
        on_progress: Callable[[float, float | None, str], Any] | None = None,
    ) -> _Options:
        """``submit``, ``map`` and ``stream`` with options for each call: *timeout* seconds from the start of its work,
        after which it is stopped and fails with ``TimeoutError``; *retries* after a worker died (not of a stream, nor
        of a call with ports: these are lost with the worker); *on_progress*, called on the delivery thread with what
        the call tells by ``report``.
        """
        return _Options(self, timeout, retries, on_progress)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """No more calls. Those that were submitted run to their end (with *cancel_futures*, only those that have
        begun). *wait* until then, and until the workers have ended; ``RuntimeError`` where that would wait for itself.
        """
        if wait and delivery_thread.here:
            raise RuntimeError(
                "shutdown() would wait for itself: results are heard in this thread, which runs callbacks of futures "
                "and listeners; use shutdown(wait=False)"
            )
        with self._lock:
            self._shut = True
            waiting = list(self._waiting) if cancel_futures else []
            idle = self._idle.copy()
            self._idle.clear()
            seats = self._seats.copy()
        for call in waiting:
            call.cancel()
        for seat in idle:
            seat.leave()
        while wait:
            for seat in seats:
                seat.worker.join()
            delivery_thread.catch_up()
            with self._lock:
                seats = self._seats.copy()
                if not seats and not self._starting and not self._waiting:
                    return
            if not seats:
                time.sleep(0.001)  # another thread is about to start one

    def __repr__(self) -> str:
        with self._lock:
            state = "shut down" if self._shut else "broken" if self._broken else "open"
            busy = sum(bool(seat.calls) for seat in self._seats)
            return (
                f"<WorkerPool {self._name!r}, {state}, {busy} of {len(self._seats)} workers busy "
                f"({self._max_workers} at most), {len(self._waiting)} calls waiting>"
            )

    # Who has what

    def _submit(
        self, fn: Any, args: Any, kwargs: Any, options: _Options, *stream: Any, name: Any = None
    ) -> PoolFuture[Any]:
        if not callable(fn):
            raise TypeError(f"fn must be callable, not {fn!r}")
        task = _clone.pack((fn, args, kwargs, *stream), moving := _clone.Moving(None))
        for place, each in enumerate(moving.objects):
            each._check_movable(f"port {place} in the arguments")
        call: PoolFuture[Any] = PoolFuture(self, name or fn, task, options)
        try:
            with self._lock:
                if self._broken is not None:
                    raise self._why_broken()
                if self._shut:
                    raise RuntimeError("cannot submit: this pool was shut down")
                self._waiting.append(call)
            self._fill()
        except BaseException:  # no worker could be started
            with self._lock:
                if call in self._waiting:
                    self._waiting.remove(call)
            raise
        return call

    def _fill(self) -> None:
        """While calls wait: have an idle worker take them, or a new one. Raises what starting one raises."""
        while True:
            with self._lock:
                if self._broken is not None and not any(each.ready for each in self._seats):
                    break
                if not self._waiting:
                    while self._shut and self._idle:
                        self._idle.pop().leave()
                    return
                seat = self._idle[-1] if self._idle else None
                staying = sum(not each.leaving for each in self._seats)
                if seat is None and (self._broken is not None or self._starting + staying >= self._max_workers):
                    return
            seat = seat or self._start()
            if seat is not None:
                self._next(seat)
        self._fail_waiting(None)

    def _start(self) -> _Seat | None:
        """A new worker; ``None`` if another thread was faster. Not under ``lock``: a fork waits for the delivery
        thread, which may wait for that.
        """
        control, theirs = MessageChannel()
        seat = None
        counted = 0
        try:
            with self._lock:
                if self._starting + sum(not each.leaving for each in self._seats) >= self._max_workers:
                    return None
                counted = 1
                self._starting += counted
            claims = Claims()
            args = (claims, theirs, self._initializer, self._initargs)
            worker = Worker(serve, *args, name=f"{self._name}-{next(self._numbers)}", context=self._context)
            seat = _Seat(self, worker, claims, control)
            with self._lock:
                self._seats.append(seat)
                self._idle.append(seat)
            seat.listen()
        except BaseException:
            if seat is not None:  # a signal handler
                with self._lock:
                    self._remove(seat)
                seat.worker._signal(signal.SIGKILL)
            raise
        finally:
            with self._lock:
                self._starting -= counted
            if seat is None:
                control.close()
        return seat

    def _next(self, seat: _Seat) -> None:
        """*seat* has no call, or could have more: give it some that wait."""
        while True:
            problem: BaseException | None = None
            calls: list[PoolFuture[Any]] = []
            with self._lock:
                try:
                    if len(seat.calls) > seat.depth // 2 or (seat.calls and self._idle):
                        return
                    if not seat.calls and not self._waiting:
                        self._relieve()
                    if self._max_tasks is not None and seat.count >= self._max_tasks and not seat.leaving:
                        seat.leave()
                    if seat.leaving:
                        break
                    self._pick(seat, calls)
                    if not calls:
                        if self._shut and not self._waiting:
                            seat.leave()
                            break
                        return
                    if seat.give(calls):
                        if self._waiting and len(self._idle) > (seat in self._idle):
                            break  # what was taken back is for others
                        return
                    seat.leaving = True  # it died while it was idle, which is being told
                    lost = [call for call in calls if call._moves]  # at most one
                    if not lost:
                        self._waiting.extendleft(reversed(calls))
                        break
                except Exception as error:  # it cannot be sent
                    problem = error
                except BaseException:  # of a signal handler
                    self._put_back([call for call in seat.recover(calls) if call not in self._waiting])
                    raise
                finally:
                    self._note(seat)
            for call in calls:
                call._settle(error=problem or _died(seat, call))
            if problem is None:
                break
        self._refill()

    def _pick(self, seat: _Seat, calls: list[PoolFuture[Any]]) -> None:
        """Take the next calls for *seat*: a fair share of those that wait."""
        room = min(seat.depth - len(seat.calls), max(1, len(self._waiting) // len(self._seats)))
        if self._max_tasks is not None:
            room = min(room, self._max_tasks - seat.count)
        while self._waiting and len(calls) < room:
            call = self._waiting[0]
            if call.done():  # cancelled
                self._waiting.popleft()
                continue
            if call._alone and (calls or seat.calls):
                return
            calls.append(call)
            self._waiting.popleft()
            if call._alone:
                return

    def _relieve(self) -> None:
        """Somebody has nothing to do: what waits behind a call of somebody else may wait for everybody."""
        for seat in sorted(self._seats, key=lambda each: -len(each.calls)):
            if len(seat.calls) > 1:
                self._take_back(seat)
            if self._waiting:
                return

    def _take_back(self, seat: _Seat) -> None:
        """What *seat* has not begun waits again, at the head. (``_fill`` is to follow, since it may be idle now.)"""
        self._put_back(seat.take_back())
        self._note(seat)

    def _put_back(self, calls: list[PoolFuture[Any]]) -> None:
        self._waiting.extendleft(call for call in reversed(calls) if not call.done())

    def _note(self, seat: _Seat) -> None:
        """Whether *seat* is idle may have changed."""
        idle = not seat.calls and not seat.leaving and seat in self._seats
        if idle and seat not in self._idle:
            self._idle.append(seat)
        elif not idle and seat in self._idle:
            self._idle.remove(seat)

    def _refill(self) -> None:
        """A worker has gone: another one, if calls wait for it."""
        try:
            self._fill()
        except Exception as error:  # a limit of the system: nobody can be told but those who wait
            with self._lock:
                if any(not each.leaving for each in self._seats):
                    return  # others are there for them
            self._fail_waiting(error)

    def _remove(self, seat: _Seat) -> None:
        for each in (self._seats, self._idle):
            if seat in each:
                each.remove(seat)

    def _abandon(self, call: PoolFuture[Any]) -> None:
        """Nobody waits for *call*: have it stopped if it runs."""
        with self._lock:
            seat = call._seat
            if seat is None:
                try:
                    self._waiting.remove(call)
                except ValueError:
                    pass
                return
            self._take_back(seat)
            if call._seat is seat:  # it has begun
                seat.control.post_message(call._number)
                delivery_thread.call_later(self._grace, partial(_replace, weakref.ref(seat), call._number))
        self._refill()

    def _lost(self, seat: _Seat) -> None:
        """A worker has ended."""
        with self._lock:
            self._remove(seat)
            left, seat.leaving = seat.leaving, True
            hit, back = list(seat.calls.values()), seat.take_back()
            lost = [call for call in hit if call._moves or (call not in back and call._retries < 1)]
            again = [call for call in hit if call not in lost and not call.done()]
            for call in hit:
                call._seat = None
            for call in again:
                call._retries -= call not in back
            self._waiting.extendleft(reversed(again))
            seat.calls.clear()
        seat.claims.close()
        if not seat.ready and not left:
            self._check_habit(seat)
        self._refill()
        for call in lost:
            call._settle(error=_died(seat, call))

    def _check_habit(self, seat: _Seat) -> None:
        """A worker ended before it was ready: the next one may, too."""
        worker = seat.worker
        worker.join(5)
        self._stillborn += 1
        error = worker._what_escaped()
        if (worker.exitcode or 0) >= 0 or self._stillborn >= _STILLBORN:  # not at once if somebody killed it
            text = (
                f"{worker.name} (pid {worker.pid}) ended, {_in_words(worker.exitcode)}, before it was ready for calls"
            )
            self._break(error or WorkerStartError(text), None)

    def _break(self, error: BaseException, packed: Packed | None) -> None:
        """Workers cannot begin: a new one would not either."""
        text = str(error)
        with self._lock:
            self._broken = text, packed
            calls: list[PoolFuture[Any]] = []
            for seat in self._seats:
                if not seat.ready:
                    calls += seat.calls.values()
                    seat.take_back()
                    seat.calls.clear()
                    seat.leave()
        for call in calls:
            call._seat = None
            call._settle(error=self._why_broken(error))
        self._fail_waiting(None)

    def _why_broken(self, error: BaseException | None = None) -> BaseException:
        assert self._broken is not None
        text, packed = self._broken
        broken = WorkerStartError(text)
        broken.__cause__ = error.__cause__ if error is not None else None
        if packed is not None:
            broken.__cause__ = unpack_error(packed)
        return broken

    def _fail_waiting(self, error: BaseException | None) -> None:
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
        for call in waiting:
            call._settle(error=error or self._why_broken())

    def _map(
        self,
        fn: Callable[..., T],
        iterables: tuple[Iterable[Any], ...],
        timeout: float | None,
        chunksize: int,
        buffersize: int | None,
        options: _Options,
    ) -> Iterator[T]:
        if not isinstance(chunksize, int) or chunksize < 1:
            raise ValueError(f"chunksize must be a number above 0, not {chunksize!r}")
        if buffersize is not None and (not isinstance(buffersize, int) or buffersize < 1):
            raise ValueError(f"buffersize must be a number above 0, or None, not {buffersize!r}")
        items = zip(*iterables, strict=False)
        chunks = iter(lambda: list(islice(items, chunksize)), [])
        ahead: deque[PoolFuture[list[T]]] = deque()
        deadline = None if timeout is None else time.monotonic() + timeout

        def fill() -> None:
            for chunk in islice(chunks, (buffersize or 8 * self._max_workers) - len(ahead)):
                ahead.append(self._submit(run_chunk, (fn, chunk), {}, options, name=fn))

        def results() -> Iterator[T]:
            try:
                while ahead:
                    chunk = ahead[0].result(_left(deadline))
                    ahead.popleft()
                    fill()
                    yield from chunk
            finally:
                for call in ahead:
                    call.cancel()

        fill()
        return results()


def _dismiss(seats: list[_Seat]) -> None:
    """Nobody has the pool any more, or its futures: its workers may go."""
    for seat in seats:
        seat.leave()


def _replace(reference: weakref.ref[_Seat], number: int) -> None:
    """The grace is over."""
    seat = reference()
    pool = None if seat is None else seat.pool()
    if seat is None or pool is None:
        return
    with pool._lock:
        if number not in seat.calls:
            return
        pool._take_back(seat)
        if next(reversed(seat.calls), None) == number:  # else it has ended, and its answer is on the way
            seat.worker._signal(signal.SIGKILL)
    pool._refill()


def _expire(reference: weakref.ref[PoolFuture[Any]], giver: weakref.ref[_Seat], number: int) -> None:
    call, seat = reference(), giver()
    if call is None or seat is None or call._seat is not seat or call._number != number or call.done():
        return
    pool = call._pool
    call._settle(error=TimeoutError(f"{_describe(call)} did not end in {call._timeout} s, and is stopped"))
    if pool is not None:
        pool._abandon(call)


def _describe(call: PoolFuture[Any]) -> str:
    return f"the call of {call._name}"


def _died(seat: _Seat, call: PoolFuture[Any]) -> WorkerDied:
    worker = seat.worker
    worker.join(5)
    code = worker.exitcode
    hint = ""
    if code == -signal.SIGKILL:
        hint = (
            "; if nobody killed it, the system may have run out of memory: look at `dmesg`, and at how much it needed"
        )
    elif code is not None and code < 0:
        hint = "; `python -X faulthandler` shows where a crash happened"
    text = f"{worker.name} (pid {worker.pid}) died, {_in_words(code)}, during {_describe(call)}{hint}"
    return WorkerDied(text, worker.name, worker.pid, code)


@final
class PoolStream(Stream[T]):
    """The values of a generator function in a worker. See ``WorkerPool.stream``."""

    def __init__(self, pool: WorkerPool, fn: Callable[..., Any], args: Any, kwargs: Any, options: _Options) -> None:
        port, theirs = MessageChannel()
        super().__init__(port)
        try:
            self._call = pool._submit(fn, args, kwargs, options, theirs)
        except BaseException:
            port.close()
            theirs.close()
            raise
        self._call.add_done_callback(lambda _: theirs.close())  # if it has not moved

    def _ended_early(self, error: PortClosedError) -> None:
        self._call.result()

    async def _aended_early(self, error: PortClosedError) -> None:
        await self._call

    def close(self) -> None:
        """Enough. The generator is closed at its next value; after the pool's ``grace`` its worker is replaced."""
        super().close()
        self._call.cancel()

    def _name(self) -> str:
        return f"of {_describe(self._call)}"
