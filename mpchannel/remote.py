"""Objects that live behind a port: ``expose(obj, port)`` there, ``wrap(port)`` or ``awrap(port)`` here.

    caller                                            where the object lives
    port     === lane, request, request, ... ===>     expose: obj.method(*args), where listeners run
    a lane   <== its answer =====================     one request at a time has it
    ports of their own: values of a generator (_stream), and functions among arguments, which stay with the caller

Requests go through one port, so they begin in the order of their calls. Answers come back each by a *lane*, a channel
that is made once and used again: whoever waits receives its own answer itself, in one system call, with no thread
between; an answer that cannot be loaded is known by its lane; and a call that is given up closes it, which the other
side hears. A request begins with the number of its lane, so that one whose rest cannot be loaded is answered as well.

House rules: arguments and results are copied, ports among them move. A function that is itself an argument is called
where it came from: by the thread that waits for the call, as long as it does, and then where listeners run. A thread
that waits answers the calls of all that is to be called in it, so that no circle of calls waits for itself. When the
port is over, so are its lanes, whoever closed it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import AsyncIterator, Iterator
from functools import partial
from itertools import count
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, Final, NamedTuple, NoReturn, Self

from . import _clone
from ._answer import answer
from ._delivery import Home, delivery_thread, home
from ._failure import pack_error, unpack_error
from ._stream import Stream, write_in_turns
from .channel import MessageChannel, receive_message_on_port, wait
from .errors import MessageError, PortClosedError
from .events import CloseEvent, MessageErrorEvent, MessageEvent
from .port import MessagePort
from .worker import Worker

__all__ = ["AsyncProxy", "Proxy", "awrap", "expose", "release", "wrap"]

AnyPort = MessagePort[Any, Any]

_GET, _SET, _CALL, _NAMES = "get", "set", "call", "names"
_FAILED, _RESULT, _METHOD, _STREAM = "failed", "result", "method", "stream"
_PATIENCE: Final = 0.5  # seconds that a lane may end before the port does

_exposed: Final[dict[tuple[int, bytes], _Exposed]] = {}
"""By process, which may fork, and channel."""
_wrapped: Final[weakref.WeakKeyDictionary[AnyPort, weakref.ref[_Caller]]] = weakref.WeakKeyDictionary()


class _Loading(threading.local):
    lane: int | None = None


_loading: Final = _Loading()


class _LaneNumber(int):
    """First in each request: known when it is loaded, also if the rest cannot be."""

    def __reduce__(self) -> Any:
        return _begin_request, (int(self),)


def _begin_request(number: int) -> int:
    _loading.lane = number
    return number


class _Function(NamedTuple):
    """Stands for a function among the arguments: a port behind which it is exposed."""

    port: AnyPort


# Where the object lives


def expose(obj: Any, port: AnyPort | Worker) -> None:
    """Have the other end of *port* use *obj*: its attributes, methods, generators, and *obj* itself if it is callable.

    Returns at once. Calls run where listeners of *port* run (the asyncio loop of this thread, else the delivery
    thread), one at a time; there coroutine functions are awaited, side by side. Names that begin with an underscore
    are not served. *obj* is held until the channel is closed. The other end is for ``wrap`` or ``awrap``.

    Raises ``TypeError`` if *port* is no port, ``ValueError`` if it is in use.
    """
    _Exposed(obj, _port_of(port, "expose")).start(home())


class _Exposed:
    """An object, and the port through which it is called. The port holds it."""

    def __init__(self, obj: Any, port: AnyPort) -> None:
        self._obj = obj
        self.port = port
        self._home: Home | None = None
        self._lanes: dict[int, AnyPort] = {}

    def start(self, at: Home) -> None:
        port = self.port
        self._home = at
        _exposed[os.getpid(), port._channel] = self
        port._set_handler("message", self.heard)
        port._set_handler("messageerror", self._misheard)
        port._afterwards += (self._over,)
        port._start_at(at)
        if port.closed:
            self._over()  # before it knew of us

    def heard(self, event: MessageEvent[Any], at: Home | None = None) -> None:
        """A request. *at*: where what takes its time may go on, if not where the port's listeners run."""
        _loading.lane = None
        number, kind, *details = event.data
        if kind is None:
            self._lanes[number] = lane = event.ports[0]
            lane.once("close", partial(self._forget, number))
            return
        event.data = None  # the arguments are the method's
        lane = self._lanes.get(number)
        if lane is None:
            return  # given up before it began
        at = at or self.port._home or home()
        name = details[0] or "the object"
        answer(partial(self._do, lane, kind, *details), partial(self._tell, lane, kind, at), at, f"{name}()")

    def _forget(self, number: int, event: CloseEvent) -> None:
        if self._lanes.get(number) is event.target:
            del self._lanes[number]

    def _misheard(self, event: MessageErrorEvent) -> None:
        self._refuse(event.error)

    def _refuse(self, error: BaseException) -> None:
        """A request cannot be loaded here."""
        lane, _loading.lane = self._lanes.get(-1 if _loading.lane is None else _loading.lane), None
        if lane is None:
            raise error
        lane.post_message((_FAILED, pack_error(error.__cause__ or error)))

    def take_one(self) -> None:
        """Answer a request in this thread, if there is one."""
        _loading.lane = None
        try:
            event = receive_message_on_port(self.port)
        except MessageError as error:
            self._refuse(error)
        else:
            if event is not None:
                self.heard(event, delivery_thread)

    def _do(self, lane: AnyPort, kind: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kind == _NAMES:
            return [each for each in dir(self._obj) if not each.startswith("_")]
        if name.startswith("_"):
            raise AttributeError(f"{name!r} is not served: it begins with an underscore")
        if kind == _SET:
            setattr(self._obj, name, *args)
            return None
        found = getattr(self._obj, name) if name else self._obj
        if kind == _GET:
            return found
        import inspect  # which takes as long to import as half of mpchannel

        on_loop = inspect.iscoroutinefunction(found) or inspect.isasyncgenfunction(found)
        become = partial(_arrived, AsyncProxy if on_loop else Proxy)
        result = found(*map(become, args), **{key: become(each) for key, each in kwargs.items()})
        return _UnlessGivenUp(result, lane) if hasattr(result, "__await__") else result

    def _tell(self, lane: AnyPort, kind: str, at: Home, good: bool, result: Any) -> None:
        if not good:
            lane.post_message((_FAILED, result))
        elif kind == _GET and callable(result):
            lane.post_message((_METHOD, None))
        elif kind == _CALL and isinstance(result, (Iterator, AsyncIterator)) and not isinstance(result, MessagePort):
            if at is delivery_thread and not isinstance(result, Iterator):
                raise TypeError("an async generator needs an asyncio loop: call expose() in its thread while it runs")
            ours, theirs = MessageChannel()
            lane.post_message((_STREAM, theirs), [theirs])
            write_in_turns(result, ours, at)
        else:
            lane._post(_clone.pack((_RESULT, result), _clone.Moving(None)), "returned")

    def _over(self) -> None:
        _exposed.pop((os.getpid(), self.port._channel), None)
        self.port._clear_listeners()  # a port that refers to us is a cycle
        for lane in list(self._lanes.values()):
            lane._clear_listeners()
            lane.close()
        self._lanes.clear()
        self._obj = None


def _arrived(kind: type[Proxy], argument: Any) -> Any:
    return kind(_Caller(argument.port)) if type(argument) is _Function else argument


class _UnlessGivenUp:
    """To be awaited until the caller closes the lane."""

    def __init__(self, awaitable: Any, lane: AnyPort) -> None:
        self._awaitable = awaitable
        self._lane = lane

    def __await__(self) -> Any:
        return self._run().__await__()

    async def _run(self) -> Any:
        import asyncio

        stop = partial(_cancel, asyncio.current_task())
        self._lane.on("close", stop)
        try:
            return await self._awaitable
        finally:
            self._lane.off("close", stop)
            del stop  # the task's own exception would hold it, and so itself

    def close(self) -> None:
        """It will not be awaited."""
        if hasattr(self._awaitable, "close"):
            self._awaitable.close()


def _cancel(task: Any, _: object) -> None:
    task.cancel()


# Where it is used


class _Lane(NamedTuple):
    number: int
    port: AnyPort


class _Caller:
    """This side of a channel to an object: what proxies share."""

    def __init__(self, port: AnyPort, worker: Worker | None = None) -> None:
        self.port = port
        self._worker = worker
        self._numbers = count()
        self._free: list[_Lane] = []
        self._busy: weakref.WeakSet[AnyPort] = weakref.WeakSet()  # of lanes whose answers are awaited
        _wrapped[self.port] = weakref.ref(self)

    def call(self, kind: str, name: str = "", args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Ask, and wait. Returns or raises what the other side did."""
        functions: list[_Exposed] = []
        lane = self._free_lane(name)
        try:
            self._ask(lane, functions, kind, name, args, kwargs or {})
            mine = _called_here()
            if functions or mine:
                _serve_until(lane.port, functions + mine)
            said = lane.port.recv()
        except BaseException as error:
            self._raise(error, lane, name)
        finally:
            for each in functions:
                each.start(home())
        return self._result(lane, said, Method(self, name))

    async def acall(
        self, kind: str, name: str = "", args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """``call`` for asyncio. Cancelling it cancels a coroutine there."""
        functions: list[_Exposed] = []
        lane = self._free_lane(name)
        try:
            self._ask(lane, functions, kind, name, args, kwargs or {})
            for each in functions:
                each.start(home())
            said = await lane.port.arecv()
        except BaseException as error:
            self._raise(error, lane, name)
        return self._result(lane, said, AsyncAttribute(self, name))

    def _raise(self, error: BaseException, lane: _Lane, name: str) -> NoReturn:
        """*error* came up in a call."""
        try:
            if isinstance(error, MessageError):  # the answer has come, and cannot be loaded
                self._put_back(lane)
                raise error
            self._busy.discard(lane.port)
            lane.port.close()  # an answer may still come; and the other side hears that nobody waits for it
            if isinstance(error, PortClosedError):
                self._raise_unanswered(name, error)
            raise error
        finally:
            del error  # a frame that holds what it raises is a cycle, which would keep the arguments

    def _put_back(self, lane: _Lane) -> None:
        self._busy.discard(lane.port)
        self._free.append(lane)

    def _ask(
        self, lane: _Lane, functions: list[_Exposed], kind: str, name: str, args: tuple[Any, ...], kwargs: Any
    ) -> None:
        """Post a request. *functions*: where those among the arguments are put, exposed."""
        far: list[AnyPort] = []

        def keep(argument: Any) -> Any:
            if not isinstance(argument, _FUNCTIONS):
                return argument
            near, there = MessageChannel()
            functions.append(_Exposed(argument, near))
            far.append(there)
            return _Function(there)

        try:
            given = tuple(map(keep, args)), {key: keep(each) for key, each in kwargs.items()}
            moving = _clone.Moving(None)
            request = _clone.pack((_LaneNumber(lane.number), kind, name, *given), moving)
            for place, each in enumerate(moving.objects):
                each._check_movable(f"port {place} in the arguments")
            if not self.port._post(request, "given to a remote object"):
                raise PortClosedError
        except BaseException:
            for port in far:
                port.close()
            raise

    def _free_lane(self, name: str) -> _Lane:
        while True:
            try:
                lane = self._free.pop()
            except IndexError:
                lane = self._open(name)
            if lane.port._departure is None:  # else this is a forked child, and it was the parent's
                self._busy.add(lane.port)
                return lane

    def _open(self, name: str) -> _Lane:
        ours, theirs = MessageChannel()
        lane = _Lane(next(self._numbers), ours)
        try:
            accepted = self.port.post_message((lane.number, None, theirs), [theirs])
        except BaseException:
            ours.close()
            theirs.close()
            raise
        if not accepted:
            ours.close()
            self._raise_unanswered(name, None)
        return lane

    def _result(self, lane: _Lane, said: tuple[str, Any], method: Any) -> Any:
        self._put_back(lane)
        kind, value = said
        if kind == _FAILED:
            raise unpack_error(value)
        if kind == _METHOD:
            return method
        if kind == _STREAM:
            return Stream(value)
        return value

    def _raise_unanswered(self, name: str, error: PortClosedError | None) -> NoReturn:
        """The channel is closed: say why, as the port knows it."""
        why: BaseException | None = error
        try:
            self.port.recv(_PATIENCE)
        except PortClosedError as closed:
            why = error = closed
        except TimeoutError:
            pass
        if self._worker is not None:
            self._worker._reap(_PATIENCE)
            why = (self._worker.exitcode is not None and self._worker._what_escaped()) or why
        call = f"the call of {name}()" if name else "this call"
        text = error if error is not None else "the channel is closed"
        raise PortClosedError(f"{call} will not be answered: {text}", None if error is None else error.reason) from why

    def movable(self) -> AnyPort:
        """What moves if a proxy is given to another process."""
        if self._worker is not None:
            raise TypeError(f"a proxy of {self._worker!r} stays with it; have the worker expose its object to a port")
        return self.port

    def close(self) -> None:
        self.port.close()
        for port in [*(lane.port for lane in self._free), *self._busy]:
            port.close()

    def __repr__(self) -> str:
        return repr(self._worker or self.port)


def _called_here() -> list[_Exposed]:
    """What is called in this very thread, so that it could not be while the thread waits."""
    pid = os.getpid()
    return [
        each for (at, _), each in list(_exposed.items()) if at == pid and each._home is not None and each._home.here
    ]


def _serve_until(lane: AnyPort, exposed: list[_Exposed]) -> None:
    """Answer calls of what is *exposed* until the answer is there."""
    while True:
        ready = wait([lane, *(each.port for each in exposed if not each.port.closed)])
        if lane in ready:
            return
        for each in exposed:
            if each.port in ready:
                each.take_one()


class Proxy:
    """Stands for an object behind a port, as ``wrap`` gives it: attributes are got and set there, methods called
    there, and each waits for the answer. Names with an underscore are this object's own. ``with`` releases it.
    Given to a process, it moves there, as its port would.
    """

    __slots__ = ("__weakref__", "_caller", "_methods")

    def __init__(self, caller: _Caller) -> None:
        self._caller = caller
        self._methods: dict[str, Method] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{name!r}: names with an underscore are local, and a proxy has no such one")
        found = self._methods.get(name)
        if found is None:
            found = self._caller.call(_GET, name)
            if type(found) is Method:
                self._methods[name] = found
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            self._caller.call(_SET, name, (value,))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._caller.call(_CALL, "", args, kwargs)

    def __dir__(self) -> list[str]:
        return list(self._caller.call(_NAMES))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._caller.close()

    def __reduce__(self) -> Any:
        return type(self)._wrapping, (self._caller.movable(),)

    @classmethod
    def _wrapping(cls, port: AnyPort) -> Self:
        return cls(_Caller(port))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of an object behind {self._caller!r}>"


class Method:
    """A method of an object behind a port."""

    __slots__ = ("__name__", "_caller")

    def __init__(self, caller: _Caller, name: str) -> None:
        self._caller = caller
        self.__name__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._caller.call(_CALL, self.__name__, args, kwargs)

    def __repr__(self) -> str:
        return f"<method {self.__name__!r} of an object behind {self._caller!r}>"


class AsyncProxy(Proxy):
    """Stands for an object behind a port, as ``awrap`` gives it: ``await proxy.attribute``, ``await proxy.method()``,
    ``async for value in await proxy.generator()``. Calls begin in the order in which they were made.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{name!r}: names with an underscore are local, and a proxy has no such one")
        return AsyncAttribute(self._caller, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            raise AttributeError(f"an assignment cannot be awaited: have a method of the object set {name!r}")
        object.__setattr__(self, name, value)

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return await self._caller.acall(_CALL, "", args, kwargs)

    def __dir__(self) -> list[str]:
        return []  # to ask would be to wait

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._caller.close()


class AsyncAttribute:
    """An attribute of an object behind a port: await it, or call it and await that."""

    __slots__ = ("__name__", "_caller")

    def __init__(self, caller: _Caller, name: str) -> None:
        self._caller = caller
        self.__name__ = name

    def __await__(self) -> Any:
        return self._caller.acall(_GET, self.__name__).__await__()

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return await self._caller.acall(_CALL, self.__name__, args, kwargs)

    def __repr__(self) -> str:
        return f"<attribute {self.__name__!r} of an object behind {self._caller!r}>"


_FUNCTIONS: Final = (FunctionType, MethodType, BuiltinFunctionType, partial, Proxy, Method, AsyncAttribute)
"""What stays with the caller when it is an argument."""


def wrap(port: AnyPort | Worker) -> Any:
    """A proxy for the object that the other end of *port*, or a ``Worker``, exposes: use it as if it were here.

    ``proxy.name`` and ``proxy.method(...)`` wait for the answer. Exceptions are raised as themselves, with the
    traceback there as ``__cause__``; a method that does not exist is an ``AttributeError`` at once. What a generator
    yields comes as a ``Stream``. Arguments are copied, ports among them move; a function (lambda, method, partial,
    proxy) that is an argument itself is called here, when the other side calls it, by the thread that waits meanwhile,
    else where listeners run. For type checkers: ``store: Store = wrap(port)``.

    When the other side closes or ends, pending and later calls raise ``PortClosedError`` with the reason. ``release``
    lets go; so does dropping the proxy. The port is the proxy's from now on.

    Raises ``TypeError`` if *port* is no port, ``ValueError`` if it is in use, ``PortDetachedError`` if it has moved.
    """
    return Proxy(_Caller(_port_of(port, "wrap"), port if isinstance(port, Worker) else None))


def awrap(port: AnyPort | Worker) -> Any:
    """``wrap`` for asyncio: ``await proxy.name``, ``await proxy.method(...)``. Cancelling that cancels a coroutine at
    the other side. Functions among the arguments may be coroutine functions; all are called on this loop.
    """
    return AsyncProxy(_Caller(_port_of(port, "awrap"), port if isinstance(port, Worker) else None))


def release(proxy: Any) -> None:
    """Let go of the object behind *proxy*: its channel is closed, and what exposes the object lets go of it too.

    Raises ``TypeError`` for what is no proxy.
    """
    if not isinstance(proxy, Proxy):
        raise TypeError(f"release takes what wrap or awrap returned, not {proxy!r}")
    proxy._caller.close()


def _port_of(port: Any, how: str) -> AnyPort:
    found = port._port if isinstance(port, Worker) else port
    if not isinstance(found, MessagePort):
        raise TypeError(f"{how} takes a MessagePort or a Worker, not {port!r}")
    if found._departure is not None:
        raise found._departure.error()
    user = _wrapped.get(found)
    if found._listeners.get("message") or (user is not None and user() is not None):
        raise ValueError(f"{found!r} is in use: it was exposed or wrapped before, or something listens to its messages")
    return found
