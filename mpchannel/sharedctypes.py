"""Shared ctypes objects: the standard library's, whose locks are of mpchannel's default context where none is given.

(A lock of one start method cannot be shared with a process of another, and the two packages may have set different
ones.)
"""

from __future__ import annotations

import multiprocessing.sharedctypes as stdlib
from typing import Any

from .context import default_context

RawArray = stdlib.RawArray
RawValue = stdlib.RawValue
copy = stdlib.copy

__all__ = ["Array", "RawArray", "RawValue", "Value", "copy", "synchronized"]


def __getattr__(name: str) -> Any:
    return getattr(stdlib, name)


def Value(typecode_or_type: Any, *args: Any, lock: Any = True, ctx: Any = None) -> Any:
    """A ctypes object in shared memory, with a lock around it unless *lock* is false."""
    return stdlib.Value(typecode_or_type, *args, lock=lock, ctx=ctx or default_context.get_context())


def Array(typecode_or_type: Any, size_or_initializer: Any, *, lock: Any = True, ctx: Any = None) -> Any:
    """A ctypes array in shared memory, with a lock around it unless *lock* is false."""
    context = ctx or default_context.get_context()
    return stdlib.Array(typecode_or_type, size_or_initializer, lock=lock, ctx=context)


def synchronized(obj: Any, lock: Any = None, ctx: Any = None) -> Any:
    """A shared ctypes object with a lock around it."""
    return stdlib.synchronized(obj, lock, ctx or default_context.get_context())
