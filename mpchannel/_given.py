"""What a process is given: which ports, and which connections, can be reached from it.

A forked child inherits everything that its parent has open, and keeps only what it was given. For a port, which moves,
that is what the process object holds. A connection is shared, and code for the standard library's may use one that its
target finds in a global variable; so what that code can reach counts too. Where that cannot be known (the target is a
pool's, which gets its functions later; code that looks names up by itself), all connections are kept, as in the
standard library.

House rule: only looks; runs no code of the user's.
"""

from __future__ import annotations

import contextvars
import gc
import multiprocessing.process
import multiprocessing.queues
import os
import signal
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial as _partial
from typing import Any, Final

from ._shared import SharedEnd
from .connection import Connection
from .port import MessagePort

AnyPort = MessagePort[Any, Any]

_NOT_ENTERED: Final = (
    *(type, types.ModuleType, types.FrameType, types.TracebackType, types.CodeType, weakref.ref),
    multiprocessing.queues.Queue,  # what waits in it goes to whoever takes it, which this process need not be
)


def given_ports(process: multiprocessing.process.BaseProcess) -> list[AnyPort]:
    """The ports that *process* is given: reachable from its target, arguments and attributes, through containers,
    instances, closures, partials and bound methods, and through the globals that a lambda or nested target names.
    """
    return list(_reached(MessagePort, [*vars(process).values()], _referents, None))


def _reached(
    wanted: type,
    level: list[Any],
    of_function: Callable[[types.FunctionType], Iterable[Any]],
    of_class: Callable[[type], Iterable[Any]] | None,
) -> Iterator[Any]:
    """The instances of *wanted* that can be reached from the things of a *level*. What functions and classes refer to
    is for the caller to say; with *of_class* the classes of instances are entered too.
    """
    seen: set[int] = set()
    while level:
        # By levels, and by type(): a million small tuples take a second, and a proxy's __class__ is not asked.
        entered: list[Any] = []
        following: list[Any] = []
        for thing in level:
            kind = type(thing)
            if id(thing) in seen or not gc.is_tracked(thing):
                continue  # what the collector does not track refers to nothing that it does
            seen.add(id(thing))
            if issubclass(kind, wanted):
                yield thing
            elif issubclass(kind, types.FunctionType):
                following += of_function(thing)
            elif not issubclass(kind, _NOT_ENTERED):
                entered.append(thing)
                if of_class is not None:
                    following.append(kind)
            elif of_class is not None and issubclass(kind, type):
                following += of_class(thing)
        level = following + gc.get_referents(*entered)


def _referents(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:
            continue  # not assigned yet
    yield from (function.__defaults__, function.__kwdefaults__, vars(function))
    if "<" in function.__qualname__:  # <lambda>, or defined in a function: not importable, so made for the occasion
        for name in function.__code__.co_names:
            yield function.__globals__.get(name)


# Code that names these may reach anything. (``getattr`` may too; but it is everywhere, and rarely does.)
_DYNAMIC: Final = {"eval", "exec", "globals", "modules", "__import__", "import_module"}
# Where the standard library and what is installed are. (As sysconfig knows, which takes milliseconds to import.)
_PACKAGES: Final = (each for each in sys.path if each.endswith(("site-packages", "dist-packages")))
_INSTALLED: Final = tuple({path + "/" for path in (os.path.dirname(os.__file__), *_PACKAGES)})


class _AnythingReachable(Exception):
    """It cannot be told what code can reach."""


def connections_in_use(process: multiprocessing.process.BaseProcess, ends: list[SharedEnd]) -> list[SharedEnd]:
    """Those of the open *ends* that the code of *process* can reach, as far as that can be told; else all."""
    if not ends:
        return []
    target = getattr(process, "_target", None)
    code = type(process) if target is None else target
    while isinstance(code, (types.MethodType, _partial)):
        code = code.__func__ if isinstance(code, types.MethodType) else code.func
    if not _is_the_users(getattr(code, "__module__", None)):
        return ends
    found: list[SharedEnd] = []
    try:
        for each in _reached(
            Connection, [type(process), *vars(process).values(), *_roots()], _all_referents, _contents
        ):
            found.append(each._end)
            if len(found) == len(ends):
                break
    except _AnythingReachable:
        return ends
    reached = {id(end) for end in found}
    return [end for end in ends if id(end) in reached]


def _roots() -> Iterator[Any]:
    """What code reaches without naming it: hooks and streams, handlers of signals and of logs, this thread."""
    things = [sys.stdin, sys.stdout, sys.stderr, sys.excepthook, threading.current_thread()]
    things += map(signal.getsignal, signal.valid_signals())
    things += contextvars.copy_context().values()
    logging = sys.modules.get("logging")
    if logging is not None:
        things += (each() for each in logging._handlerList)
    for each in things:
        if isinstance(each, (types.FunctionType, types.MethodType)) or _is_the_users(type(each).__module__):
            yield each


def _contents(kind: type) -> Iterable[Any]:
    return (*vars(kind).values(), *kind.__bases__) if _is_the_users(vars(kind).get("__module__")) else ()


def _all_referents(function: types.FunctionType) -> Iterator[Any]:
    yield from _referents(function)
    if not _is_the_users(function.__module__):
        return
    names = set(_names(function.__code__))
    if not names.isdisjoint(_DYNAMIC):
        raise _AnythingReachable
    modules: list[types.ModuleType] = []
    for name in names:
        value = function.__globals__.get(name, sys.modules.get(name))
        if isinstance(value, types.ModuleType):
            modules.append(value)
        else:
            yield value
    seen: set[int] = set()
    while modules:
        module = modules.pop()
        if id(module) in seen or not _is_the_users(module.__name__):
            continue
        seen.add(id(module))
        for name in names & vars(module).keys():
            value = vars(module)[name]
            if isinstance(value, types.ModuleType):
                modules.append(value)
            else:
                yield value


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for each in code.co_consts:
        if isinstance(each, types.CodeType):
            yield from _names(each)


def _is_the_users(module: Any) -> bool:
    """Whether a module is neither the standard library's nor installed."""
    if not isinstance(module, str):
        return False
    if module in ("__main__", "__mp_main__"):
        return True
    if module.partition(".")[0] == __package__:
        return False
    found = sys.modules.get(module)
    file = getattr(found, "__file__", None)
    return file is not None and not file.startswith(_INSTALLED)
