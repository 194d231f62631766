"""Channels between processes: connected pairs of ports, as the Web and Electron have them; and all of multiprocessing.

errors, events          what goes wrong; event classes and the listener table
_kernel                 the operating system
_overflow, _end, _link  how packets travel; _shared: on ends that several processes hold
_recycle                memory of large messages, used again
_slots                  memory for those of middling size, that both ends share
_clone                  messages <-> packets
_delivery               who runs listeners
port, channel           MessagePort, MessageChannel
connection              Pipe, Connection
sharedbuffer            SharedBuffer: memory that is shared, or moves
reduction, process,     how ports get into other processes; the standard library's processes and contexts
context
ipc, _window            named channels between a parent and its children; window, a process's own message target
worker                  Worker, parent_port, worker_data
remote                  expose, wrap: objects that live behind a port
_task, workerpool       WorkerPool: an Executor of workers
_status, _sockdiag      what waits where; _inspect: all of it, as plain data
_trace                  trace: what messages do, in a file
_forward                the rest of multiprocessing
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from . import _forward, ipc
from ._task import cancelled, report
from ._window import window
from .channel import MessageChannel, receive_message_on_port, wait
from .context import default_context, get_context
from .errors import (
    BufferFull,
    BufferInUseError,
    ChannelError,
    DataCloneError,
    MessageError,
    PortClosedError,
    PortDetachedError,
    RemoteError,
    WorkerDied,
    WorkerStartError,
)
from .events import CloseEvent, ErrorEvent, ExitEvent, MessageErrorEvent, MessageEvent
from .port import MessagePort
from .sharedbuffer import SharedBuffer
from .worker import Worker, parent_port, worker_data

if TYPE_CHECKING:
    from ._inspect import inspect
    from ._trace import trace
    from .remote import awrap, expose, release, wrap
    from .workerpool import WorkerPool

__version__ = "0.1.0"

# Imported when asked for: they take as long as all the rest (concurrent.futures, inspect).
_LATER = {"WorkerPool": "workerpool", "inspect": "_inspect", "trace": "_trace"} | dict.fromkeys(
    ("awrap", "expose", "release", "wrap"), "remote"
)

# Everything that `multiprocessing` has, of a context that is ours.
_forwarded = [name for name in dir(default_context) if not name.startswith("_") and name != "current"]
globals().update((name, getattr(default_context, name)) for name in _forwarded)
Process = default_context.Process
SUBDEBUG, SUBWARNING = 5, 25

__all__ = [
    "BufferFull",
    "BufferInUseError",
    "ChannelError",
    "CloseEvent",
    "DataCloneError",
    "ErrorEvent",
    "ExitEvent",
    "MessageChannel",
    "MessageError",
    "MessageErrorEvent",
    "MessageEvent",
    "MessagePort",
    "PortClosedError",
    "PortDetachedError",
    "RemoteError",
    "SharedBuffer",
    "Worker",
    "WorkerDied",
    "WorkerPool",
    "WorkerStartError",
    "awrap",
    "cancelled",
    "expose",
    "get_context",
    "inspect",
    "ipc",
    "parent_port",
    "receive_message_on_port",
    "release",
    "report",
    "trace",
    "wait",
    "window",
    "worker_data",
    "wrap",
]
__all__ += [name for name in _forwarded if name not in __all__]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        return _forward.submodule(__name__, name)
    globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


sys.meta_path.insert(0, _forward.Finder(__name__))

if "MPCHANNEL_TRACE" in os.environ or "MPCHANNEL_TRACE_SPOOL" in os.environ:
    from ._trace import from_environment

    from_environment()
