"""Functions that run at the other end of ports with a codec."""

from __future__ import annotations

from typing import Any


def tell_codec_and_echo(port: Any) -> None:
    port.post_message([port.codec, port.max_message_size])
    for message in port:
        port.post_message(message)
