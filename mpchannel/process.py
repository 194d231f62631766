"""``Process`` under the three start methods: the stdlib's, whose arguments may hold ports.

What is added to the stdlib's: a closed or moved port among the arguments makes ``start()`` raise under fork too, and
the goodbye of the child's ports comes after its last thread has ended.
"""

from __future__ import annotations

import multiprocessing.context
import multiprocessing.process
from typing import Any

from ._delivery import say_goodbye
from .reduction import given_ports, starts_failed

__all__ = ["Process"]


class _Crossing(multiprocessing.process.BaseProcess):
    def start(self) -> None:
        for port in given_ports(self):
            port._check_movable("an argument of the process")
        try:
            super().start()
        except BaseException:
            starts_failed()
            raise

    def _bootstrap(self, *args: Any, **options: Any) -> int:
        try:
            code: int = super()._bootstrap(*args, **options)  # type: ignore[misc]
            return code
        finally:
            say_goodbye()


class Process(_Crossing, multiprocessing.context.Process):
    """``multiprocessing.Process``: ports in ``target``, ``args``, ``kwargs`` and attributes move to the child.

    They are detached here when ``start()`` returned, and untouched when it raised.
    """


class ForkProcess(_Crossing, multiprocessing.context.ForkProcess):
    pass


class SpawnProcess(_Crossing, multiprocessing.context.SpawnProcess):
    pass


class ForkServerProcess(_Crossing, multiprocessing.context.ForkServerProcess):
    pass
