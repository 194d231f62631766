"""What child processes of the tests run. Imports nothing but the package and the standard library."""

from __future__ import annotations

import os
from typing import Any

import mpchannel

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
