"""Channels between processes: connected pairs of ports, as the Web and Electron have them.

errors, events          what goes wrong; event classes and the listener table
_kernel                 the operating system
_overflow, _link        how packets travel
_clone                  messages <-> packets
_delivery               who runs listeners
port, channel           MessagePort, MessageChannel
reduction, process,     how ports get into other processes
context
"""

from __future__ import annotations

from .channel import MessageChannel, receive_message_on_port, wait
from .context import get_context
from .errors import BufferFull, ChannelError, DataCloneError, MessageError, PortClosedError, PortDetachedError
from .events import CloseEvent, MessageErrorEvent, MessageEvent
from .port import MessagePort
from .process import Process

__version__ = "0.1.0"

__all__ = [
    "BufferFull",
    "ChannelError",
    "CloseEvent",
    "DataCloneError",
    "MessageChannel",
    "MessageError",
    "MessageErrorEvent",
    "MessageEvent",
    "MessagePort",
    "PortClosedError",
    "PortDetachedError",
    "Process",
    "get_context",
    "receive_message_on_port",
    "wait",
]
