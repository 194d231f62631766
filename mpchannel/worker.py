"""Workers: processes with a port to whoever started them, as the Web, Node and Electron's utility processes have them.

    parent                                              worker
    Worker(target, *args, data=...)
      post_message, onmessage   <== messages =====>     parent_port()
      onerror                   <== control: the target and data, then "started", then what escaped
                                --- lifeline: nothing is ever sent; its end is the end of the worker

Everything that user code has to load travels by ``control``, so that a failure to load it can be told; the process's
own arguments are three ports, which always load. The worker leads a process group of its own: Ctrl-C at the terminal
reaches the parent alone, and the kernel kills the whole group when the lifeline ends, however the parent did (while
the worker itself lives: of one that was killed before, processes it had started may be left).

House rules: no thread waits for a worker's or a parent's end, and no timer runs but the grace of ``terminate``. The
parent watches a worker's process only while somebody listens for ``error`` or ``exit``.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import multiprocessing.connection
import multiprocessing.process
import os
import signal
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final, Self

from . import _clone, _endpoint
from ._delivery import Home, delivery_thread, home
from ._failure import caused, pack_error, unpack_error
from ._kernel import ProcessHandle, end_with
from ._link import open_links
from .channel import MessageChannel, receive_message_on_port
from .context import default_context, start_helpers
from .errors import DataCloneError, WorkerStartError
from .events import ErrorEvent, ExitEvent, MessageErrorEvent, MessageEvent, MessageTarget
from .ipc import ChildIpc
from .port import MessagePort

__all__ = ["Worker", "parent_port", "worker_data"]

AnyPort = MessagePort[Any, Any]

_GRACE: Final = 1.0  # seconds from SIGTERM to SIGKILL
_numbers: Final = itertools.count(1)


class Worker(MessageTarget):
    """A process that runs *target*, with a port between it and this process.

    *target* is a callable, or the name of one as ``"package.module:function"``; it is called with *args* in the new
    process, where ``parent_port()`` is the other end of this object and ``worker_data()`` is *data*. When it returns
    (a coroutine function: when its coroutine does), the worker lives on while it has a started, ref'd port with a
    ``message`` listener, or a ref'd worker of its own, as in Node; else it ends. It also ends when this process does.

    Ports in *args* move there; those in *data* must be listed in *transfer*, which moves too. *preload*, a function
    without arguments or the name of one, runs there before *target* is even loaded (Electron's preload scripts: it can
    listen at ``ipc.parent`` and hand over to ``window``). *name* is the process's, *context* a context of
    ``get_context`` or the name of a start method.

    The constructor starts the process and does not wait for it. It raises ``TypeError`` or ``ValueError`` for bad
    arguments, ``DataCloneError`` for what cannot be sent, ``OSError`` at a limit; nothing has moved then.

    Events: ``message``, ``messageerror``, ``error`` (an exception that escaped the target, as it was, with its
    traceback as ``__cause__``; or ``WorkerStartError``), ``exit``. The last two reach listeners added late as well.
    Listeners run where those of ports do; to listen starts the queue. (Node, worker_threads.)
    """

    event_types = ("message", "messageerror", "error", "exit")

    def __init__(
        self,
        target: Callable[..., Any] | str,
        *args: Any,
        data: Any = None,
        transfer: Iterable[Any] | None = (),
        preload: Callable[[], Any] | str | None = None,
        name: str | None = None,
        context: Any = None,
    ) -> None:
        super().__init__()
        _check_function(target, "target")
        if preload is not None:
            _check_function(preload, "preload")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a str, not {name!r}")
        if context is None or isinstance(context, str):
            context = default_context.get_context(context)
        self._reaping = threading.RLock()  # of two threads that ask multiprocessing at once, one may be told nonsense
        self._ref = True
        self._terminated = False
        self._home: Home | None = None
        self._handle: ProcessHandle | None = None
        self._watching = False  # the home tells us, or has told us, when the process has ended
        self._told = threading.Event()  # listeners were, of how it ended
        self._said: list[Any] = []  # by control, once it has ended
        self._finished: dict[str, partial[Any]] = {}  # makes the events; empty until it is known how it ended
        with contextlib.ExitStack() as undo:  # closes the channels if it fails
            self._port: AnyPort
            self._port, theirs = undo.enter_context(MessageChannel())
            self._control, control = undo.enter_context(MessageChannel())
            self._lifeline, lifeline = undo.enter_context(MessageChannel())
            first = _clone.pack(preload)
            work = _clone.pack((target, args), moving := _clone.Moving(None))
            for place, each in enumerate(moving.objects):
                each._check_movable(f"port {place} in the arguments")
            listed = () if transfer is None else control._check_list(transfer)
            if any(each is other for each in listed for other in moving.objects):
                raise DataCloneError("a port is both in the arguments and in transfer; it can move only once")
            packed = _clone.pack(data, _clone.Moving(listed))
            process = context.Process(target=_work, args=(theirs, control, lifeline))
            process.name = name or f"Worker-{next(_numbers)}"
            process.ipc = self._ipc = ChildIpc(self)
            try:
                with _interrupts_held_back(context.get_start_method()):
                    process.start()
                    self._process = process
                    process._worker = self  # multiprocessing holds the process until it is joined: so it goes on
                    undo.pop_all()
                    for part in (packed, first, work):
                        self._control._post(part, "given to a worker")
            except BaseException:  # a Ctrl-C that was held back, too: nobody will have this object
                if process.pid is not None:
                    process.kill()
                    process._worker = None
                raise

    # Messages

    def post_message(self, message: Any, transfer: Iterable[Any] | None = ()) -> bool:
        """Queue a copy of *message* for the worker's ``parent_port()``, and move *transfer* there; also before the
        worker has begun. Returns and raises as ``MessagePort.post_message``; ``False`` once the worker has ended."""
        return self._port.post_message(message, transfer)

    def receive(self, timeout: float | None = None) -> MessageEvent[Any]:
        """As ``MessagePort.receive``: the next message as an event; ``TimeoutError`` after *timeout* seconds,
        ``PortClosedError`` once the worker has ended.
        """
        return self._port.receive(timeout)

    def recv(self, timeout: float | None = None) -> Any:
        """As ``MessagePort.recv``: the next message itself, else as ``receive``, *timeout* too."""
        return self._port.recv(timeout)

    async def areceive(self) -> MessageEvent[Any]:
        """``receive`` for asyncio."""
        return await self._port.areceive()

    async def arecv(self) -> Any:
        """``recv`` for asyncio."""
        return await self._port.arecv()

    @property
    def onerror(self) -> Callable[[ErrorEvent], Any] | None:
        """Called once if the worker failed: an exception escaped, or it could not start."""
        return self._handler("error")

    @onerror.setter
    def onerror(self, fn: Callable[[ErrorEvent], Any] | None) -> None:
        self._set_handler("error", fn)

    @property
    def onexit(self) -> Callable[[ExitEvent], Any] | None:
        """Called once when the worker has ended, behind all its messages that are listened for."""
        return self._handler("exit")

    @onexit.setter
    def onexit(self, fn: Callable[[ExitEvent], Any] | None) -> None:
        self._set_handler("exit", fn)

    def _listeners_changed(self, type: str, added: Any) -> None:
        if type in ("message", "messageerror"):
            listening = bool(self._listeners.get("message"))
            self._port.onmessage = self._forward if listening else None
            self._port.onclose = self._forward_no_more if listening else None
            self._port.onmessageerror = self._forward if self._listeners.get("messageerror") else None
        elif added is not None:
            if self._finished:
                self._tell(type, (added,))
            else:
                self._watch(self._at())

    def _forward(self, event: MessageEvent[Any] | MessageErrorEvent) -> None:
        event.target = self
        self._emit(event, self._listeners.get(event.type, ()))

    def _forward_no_more(self, _: object) -> None:
        self._port._clear_listeners()  # a port that refers to us is a cycle

    def _emit(self, event: Any, row: Any) -> None:
        at = self._at()
        results = self._dispatch(event, row, at.report)
        if results:
            at.run(results)

    def _at(self) -> Home:
        if self._home is None or not self._home.usable:
            self._home, self._handle, self._watching = home(), None, False
        return self._home

    @property
    def ipc(self) -> ChildIpc:
        """Named channels to this worker, which finds the other side at ``mpchannel.ipc.parent``."""
        return self._ipc

    # The end

    def _watch(self, at: Home) -> None:
        if self._watching:
            return
        self._watching = True
        try:
            try:
                self._handle = handle = ProcessHandle(self._process.pid)
            except ProcessLookupError:  # reaped by somebody else
                at.call(self.turn)
            else:
                at.watch(handle, self, keep=True)  # type: ignore[arg-type]
        except OSError:  # a limit of the system: whoever listens tries again
            self._handle, self._watching = None, False
            raise

    def turn(self) -> None:
        """For the home: the process has ended."""
        at, handle = self._at(), self._handle
        if handle is not None:
            self._handle = None
            at.forget(handle)  # type: ignore[arg-type]
            handle.close()
        for port in filter(None, (self._port, self._ipc._port)):
            if port.onmessage and port._home is not None and port._home.usable and port._unread():
                at.call(self.turn)  # its last messages first
                return
        try:
            self._finish()
        finally:
            self._told.set()

    def _finish(self) -> None:
        """Find out how it ended, and tell who listens."""
        self._reap()
        error = self._what_escaped()
        found: dict[str, partial[Any]] = {} if error is None else {"error": partial(ErrorEvent, error=error)}
        found["exit"] = partial(ExitEvent, exitcode=self.exitcode or 0)
        with self.lock:
            if not self._finished:
                rows, self._finished = self._listeners.copy(), found  # whoever is in no row yet comes late
                for type in found:
                    self._tell(type, rows.get(type, ()))

    def _tell(self, type: str, row: Any) -> None:
        """How it ended: each listener by itself, so that what one raises, maybe to end the loop, costs no other one."""
        for each in row if type in self._finished else ():
            self._at().call(partial(self._emit, self._finished[type](self), (each,)))

    def _what_escaped(self) -> BaseException | None:
        started = False
        for said in self._said:
            if said == "started":
                started = True
            elif started:
                return unpack_error(said)
            else:
                text = said[1]
                return caused(WorkerStartError(f"{self.name} could not start: {text.splitlines()[-1]}"), text)
        if started or self._terminated:
            return None
        code = self.exitcode or 0
        text = f"{self.name} ended ({_in_words(code)}) before it could look for its target"
        if code < 0:
            return WorkerStartError(text)
        text += '. Is the main module importable, and are workers started only under `if __name__ == "__main__":`?'
        end = self._control._end
        if end is not None and end.why:
            return caused(WorkerStartError(f"{text} {end.why.splitlines()[-1]}"), end.why)
        return WorkerStartError(f"{text} What it says itself stands on stderr.")

    def terminate(self) -> None:
        """SIGTERM to the worker and the processes of its group; SIGKILL to those that are left a second later.
        Does nothing once the worker has ended. Does not wait: ``join`` does, for the worker itself."""
        self._terminated = True
        if self.exitcode is None:
            self._signal(signal.SIGTERM)
            delivery_thread.call_later(_GRACE, partial(self._signal, signal.SIGKILL))

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.exitcode is not None and _exists(self.pid):
                return  # its number is somebody else's by now; as long as its group has members, it cannot be
            try:
                os.killpg(self.pid, number)
            except ProcessLookupError:
                if self.exitcode is None:  # it leads no group yet
                    os.kill(self.pid, number)

    def join(self, timeout: float | None = None) -> None:
        """Wait until the worker has ended, and listeners that run on the delivery thread were told so; at most
        *timeout* seconds. ``exitcode`` tells whether it has ended."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self._reap(timeout)
        if self._home is delivery_thread and (self._watching or self._finished) and not delivery_thread.here:
            self._told.wait(_left(deadline))
            delivery_thread.catch_up(_left(deadline))

    def _reap(self, timeout: float | None = None) -> None:
        if self.exitcode is None:
            try:
                handle = ProcessHandle(self.pid)
            except ProcessLookupError:
                pass  # it has ended, and was reaped
            else:
                ended = multiprocessing.connection.wait([handle.fileno()], timeout)
                handle.close()
                if not ended:
                    return
        self._let_go()

    def _let_go(self) -> None:
        """It has ended: keep what it said, and nothing else that is of no more use."""
        with self._reaping:
            self._process.join()  # multiprocessing forgets it as well
            self._said.extend(event.data for event in iter(partial(receive_message_on_port, self._control), None))
            self._control.close()
            self._lifeline.close()
            self._ipc._break_silence()
            self._process._worker = None

    @property
    def name(self) -> str:
        """The process's name."""
        return str(self._process.name)

    @property
    def pid(self) -> int:
        """The process's number."""
        return int(self._process.pid)

    @property
    def exitcode(self) -> int | None:
        """``None`` while it runs; ``-N`` if signal N ended it."""
        with self._reaping:
            code: int | None = self._process.exitcode
            if code is not None and self._process._worker is not None:
                self._let_go()
        return code

    def ref(self) -> None:
        """Let this worker, while it runs, keep a worker alive that started it (the default)."""
        self._ref = True
        _endpoint.vigil.ring()

    def unref(self) -> None:
        """Do not let this worker keep alive the worker that started it."""
        self._ref = False
        _endpoint.vigil.ring()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End it, and wait for that."""
        self.terminate()
        self.join()

    def __repr__(self) -> str:
        state = "running" if self.exitcode is None else _in_words(self.exitcode)
        return f"<Worker {self.name!r}, pid {self.pid}, {state}>"


def _check_function(fn: Any, name: str) -> None:
    if not callable(fn) and not isinstance(fn, str):
        raise TypeError(f'{name} must be a callable or "package.module:function", not {fn!r}')
    if isinstance(fn, str) and not all(fn.partition(":")):
        raise ValueError(f'{name} must name a function as "package.module:function", not {fn!r}')


def _exists(pid: int) -> bool:
    try:
        os.getpgid(pid)
    except ProcessLookupError:
        return False
    return True


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def _in_words(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


@contextlib.contextmanager
def _interrupts_held_back(method: str) -> Iterator[None]:
    """A Ctrl-C comes behind a start, not in its midst; and not to a worker that has not left this group yet."""
    start_helpers(method)  # a fork server passes on what is blocked when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# In the worker


class _Self:
    """What this process is, if it is a worker."""

    pid = 0
    port: AnyPort | None = None
    data: Any = None
    lifeline: AnyPort | None = None


def parent_port() -> AnyPort | None:
    """In a worker: the port to whoever started it. ``None`` elsewhere, in processes that a worker forks too."""
    return _Self.port if _Self.pid == os.getpid() else None


def worker_data() -> Any:
    """In a worker: the ``data`` it was given. ``None`` elsewhere."""
    return _Self.data if _Self.pid == os.getpid() else None


def _work(port: AnyPort, control: AnyPort, lifeline: AnyPort) -> None:
    end_with(lifeline._link._socket())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # forgets one that came before this process led a group of its own
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _Self.pid, _Self.port, _Self.lifeline = os.getpid(), port, lifeline
    try:
        _Self.data = control.recv()
        preload = _found(control.recv())
        if preload is not None and isinstance(preload(), types.CoroutineType):
            raise TypeError("preload must not be a coroutine function: it is over before the target is loaded")
        target, args = control.recv()
        target = _found(target)
        control.post_message("started")
        result = target(*args)
        del target, args
        if isinstance(result, types.CoroutineType):
            import asyncio

            asyncio.run(_run(result))
        else:
            _linger()
    except SystemExit:
        raise
    except BaseException as error:
        control.post_message(pack_error(error))
        raise


def _found(target: Any) -> Any:
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{target} is not callable: {found!r}")
    return found


async def _run(coroutine: Any) -> None:
    import asyncio

    await coroutine
    await asyncio.get_running_loop().run_in_executor(None, _linger)


def _linger() -> None:
    """Wait until nothing keeps this worker alive."""
    with _endpoint.vigil.kept() as bell:
        while True:
            bell.hush()
            running = [(each, getattr(each, "_worker", None)) for each in multiprocessing.process.active_children()]
            children: list[Any] = [each.sentinel for each, worker in running if worker is not None and worker._ref]
            if not children and not _listening() and _at_rest():
                return
            if children or _listening():
                multiprocessing.connection.wait([bell.fileno(), *children])


def _listening() -> bool:
    owners = [link.owner() for link in open_links() if link.owner is not None]
    return any(isinstance(each, MessagePort) and each._keeps_alive() for each in owners)


def _at_rest() -> bool:
    """Wait for a listener that is running. Whether nothing was begun by it."""
    delivery_thread.catch_up()
    return not _listening()
