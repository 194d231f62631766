"""Every exception of mpchannel, each with the sentence that helps.

House rules: an error says what happened and what to do next. The caller's mistakes raise in the caller's
thread; the other side's become events. Limits of the operating system stay ``OSError``, with the limit in the text.
"""

from __future__ import annotations

__all__ = [
    "BufferFull",
    "BufferInUseError",
    "ChannelError",
    "DataCloneError",
    "MessageError",
    "PortClosedError",
    "PortDetachedError",
    "RemoteError",
    "WorkerDied",
    "WorkerStartError",
]


class ChannelError(Exception):
    """Base of all errors of this package."""


class DataCloneError(ChannelError, TypeError):
    """A message or a transfer list cannot be sent. Nothing was sent and nothing was detached.

    The text begins with the path to the culprit, such as ``message['jobs'][3].lock``. The error of the pickler,
    where there is one, is its ``__cause__``. (HTML calls this a "DataCloneError" DOMException.)
    """


class BufferInUseError(DataCloneError, BufferError):
    """A ``SharedBuffer`` cannot move while views of it are alive. Nothing was sent and nothing was detached."""


class PortClosedError(ChannelError, EOFError):
    """There is nothing more to receive: the channel is closed, and all that was posted has been taken.

    ``reason`` is the close event's reason, or ``None`` if the port was closed by its own holder.
    """

    reason: str | None

    def __init__(self, text: str = "the channel is closed", reason: str | None = None) -> None:
        super().__init__(text)
        self.reason = reason


class PortDetachedError(ChannelError, ValueError):
    """This port was moved away: it is used by whoever received it. The text says when and where it went."""


class MessageError(ChannelError):
    """A message arrived that cannot be loaded here. The port stays usable; the next message is not affected.

    The loading error is the ``__cause__``; ``packet`` is the packed message as it came. Ports that came with it
    were closed (reason ``undeliverable``).
    """

    packet: bytes

    def __init__(self, text: str, packet: bytes = b"") -> None:
        super().__init__(text)
        self.packet = packet


class BufferFull(ChannelError):
    """Posting would exceed the port's ``max_buffered``. Nothing was sent; wait with ``drain()`` and post again."""


class RemoteError(ChannelError):
    """An exception in another process: its text is the traceback there.

    It is the ``__cause__`` of the exception as it arrived here, or stands for it where that cannot be loaded.
    """


class WorkerStartError(ChannelError):
    """A worker could not begin: its target or its data could not be found or loaded there. The text says why."""


class WorkerDied(ChannelError):
    """A worker of a pool ended in the midst of a call: killed, crashed, or out of memory. Only that call is lost.

    ``name`` and ``pid`` are the worker's; ``exitcode`` is its exit code, ``-N`` for signal N.
    """

    name: str
    pid: int | None
    exitcode: int | None

    def __init__(self, text: str, name: str = "", pid: int | None = None, exitcode: int | None = None) -> None:
        super().__init__(text)
        self.name = name
        self.pid = pid
        self.exitcode = exitcode
