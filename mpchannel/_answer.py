"""A call from another process, answered: by what a function returns, or by its exception, packed.

House rules: this runs where listeners run. Whoever called is told in any case, also of what cannot be sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._delivery import Home, delivery_thread
from ._failure import pack_error

Tell = Callable[[bool, Any], object]
"""Posts an answer: whether all went well; the result, or the packed exception. Raises what cannot be sent."""


def answer(call: Callable[[], Any], tell: Tell, at: Home, name: str) -> None:
    """*tell* what *call* returns or raises. A coroutine runs at *at*, if that is a loop. *name* is for errors."""
    try:
        result = call()
        if hasattr(result, "__await__"):
            if at is delivery_thread:
                if hasattr(result, "close"):
                    result.close()  # or Python would warn that it was never awaited
                raise TypeError(
                    f"{name} is a coroutine function, and needs an asyncio loop: call handle() or expose() in the "
                    "loop's thread while the loop runs"
                )
            at.run([_answer_later(result, tell)])
            return
    except BaseException as error:
        tell(False, pack_error(error))
        if not isinstance(error, Exception):
            raise  # KeyboardInterrupt, SystemExit: this process is meant as well
    else:
        _tell_result(result, tell)


async def _answer_later(awaitable: Any, tell: Tell) -> None:
    import asyncio

    try:
        result = await awaitable
    except asyncio.CancelledError:
        # Here, not at the caller's, who would take it for a cancellation of his own.
        tell(False, pack_error(RuntimeError("the call was cancelled in the process that was to answer it")))
        raise
    except BaseException as error:
        tell(False, pack_error(error))
        if not isinstance(error, Exception):
            raise
    else:
        _tell_result(result, tell)


def _tell_result(result: Any, tell: Tell) -> None:
    try:
        tell(True, result)
    except Exception as error:
        tell(False, pack_error(error))
