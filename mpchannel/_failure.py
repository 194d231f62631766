"""Exceptions on their way home to another process: as themselves where they can be loaded there, else as their text."""

from __future__ import annotations

from . import _clone
from .errors import RemoteError

Packed = tuple[bytes | None, str]
"""What travels: a pickle, and the traceback here."""


def pack_error(error: BaseException) -> Packed:
    import traceback  # which takes as long to import as half of mpchannel

    text = "".join(traceback.format_exception(error))
    try:
        return _clone.dumps(error), text
    except Exception:  # whatever its class makes of it: the text is enough
        return None, text


def unpack_error(packed: Packed) -> BaseException:
    """The exception, with the remote traceback as its ``__cause__`` (a ``RemoteError``); or that itself."""
    pickled, text = packed
    if pickled is not None:
        try:
            error: BaseException = _clone.loads(pickled)
            return caused(error, text)
        except BaseException:  # whatever its class makes of it, SystemExit too: the text is what is left
            pass
    return RemoteError(text)


def caused(error: BaseException, text: str) -> BaseException:
    """*error*, with a remote traceback as its ``__cause__``."""
    BaseException.__setattr__(error, "__cause__", RemoteError(text))  # past what its class makes of it
    return error
