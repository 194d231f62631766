"""Pools of ``multiprocessing``, whose processes are of mpchannel's default context where none is given."""

from __future__ import annotations

import multiprocessing.pool as stdlib
from collections.abc import Callable, Iterable
from typing import Any

from ._forward import AlsoTheirs
from .context import default_context

__all__ = ["Pool", "ThreadPool"]


def __getattr__(name: str) -> Any:
    return getattr(stdlib, name)


class Pool(stdlib.Pool, metaclass=AlsoTheirs):
    """``multiprocessing.pool.Pool``."""

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
    ) -> None:
        super().__init__(processes, initializer, initargs, maxtasksperchild, context or default_context.get_context())


class ThreadPool(Pool, stdlib.ThreadPool, metaclass=AlsoTheirs):
    """``multiprocessing.pool.ThreadPool``."""

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
    ) -> None:
        stdlib.Pool.__init__(self, processes, initializer, initargs, context=default_context.get_context())
