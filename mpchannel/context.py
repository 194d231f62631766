"""Contexts: one per start method, with our ``Process``. Everything else in them is the stdlib's."""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
from typing import Any

from . import process

__all__ = ["get_context"]


class ForkContext(multiprocessing.context.ForkContext):
    Process = process.ForkProcess


class SpawnContext(multiprocessing.context.SpawnContext):
    Process = process.SpawnProcess


class ForkServerContext(multiprocessing.context.ForkServerContext):
    Process = process.ForkServerProcess


_contexts: dict[str, Any] = {"fork": ForkContext(), "spawn": SpawnContext(), "forkserver": ForkServerContext()}


def get_context(method: str | None = None) -> Any:
    """The context of a start method (``fork``, ``spawn``, ``forkserver``); default: the one ``multiprocessing`` uses.

    Raises ``ValueError`` for an unknown method, as the stdlib does.
    """
    if method is None:
        method = multiprocessing.get_start_method()
    context = _contexts.get(method)
    if context is None:
        raise ValueError(f"cannot find context for {method!r}: use one of {', '.join(_contexts)}")
    context._check_available()
    return context
