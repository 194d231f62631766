"""Managers of ``multiprocessing``, whose server processes are of mpchannel's default context where none is given."""

from __future__ import annotations

import multiprocessing.managers as stdlib
from typing import Any

from ._forward import AlsoTheirs
from .context import default_context

__all__ = stdlib.__all__


def __getattr__(name: str) -> Any:
    return getattr(stdlib, name)


class BaseManager(stdlib.BaseManager, metaclass=AlsoTheirs):
    """``multiprocessing.managers.BaseManager``."""

    def __init__(
        self,
        address: Any = None,
        authkey: bytes | None = None,
        serializer: str = "pickle",
        ctx: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(address, authkey, serializer, ctx or default_context.get_context(), **options)


class SyncManager(BaseManager, stdlib.SyncManager, metaclass=AlsoTheirs):
    """``multiprocessing.managers.SyncManager``."""


if hasattr(stdlib, "SharedMemoryManager"):

    class SharedMemoryManager(BaseManager, stdlib.SharedMemoryManager, metaclass=AlsoTheirs):
        """``multiprocessing.managers.SharedMemoryManager``."""
