"""The submodules of ``multiprocessing`` that mpchannel has no room of its own for, under its name: the very same.

So ``mpchannel.pool is multiprocessing.pool`` and ``from mpchannel.shared_memory import SharedMemory`` works. Each is
imported when it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class Finder:
    """Finds ``package.name`` where ``multiprocessing.name`` exists and *package* has no such module itself."""

    def __init__(self, package: str) -> None:
        self.prefix = package + "."

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(self.prefix):
            return None
        package = fullname.rpartition(".")[0]
        if sys.modules[package].__name__ == package and PathFinder.find_spec(fullname, path) is not None:
            return None  # a room of our own
        theirs = sys.modules[package].__name__.replace(self.prefix[:-1], "multiprocessing", 1)
        if not self._exists(theirs + fullname[len(package) :]):
            return None
        return ModuleSpec(fullname, self)  # type: ignore[arg-type]  # no ABC: importlib.abc takes a millisecond

    @staticmethod
    def _exists(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            return False  # not even its package does

    def create_module(self, spec: ModuleSpec) -> None:
        """As usual."""

    def exec_module(self, module: ModuleType) -> None:
        # What is imported is what then stands here. (Giving it from create_module() would rename the real one.)
        theirs = "multiprocessing." + module.__name__.removeprefix(self.prefix)
        sys.modules[module.__name__] = importlib.import_module(theirs)


def submodule(package: str, name: str) -> ModuleType:
    """For ``package.name`` without an import of it. Raises ``AttributeError``."""
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"{package}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{package}.{name}":
                raise
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


class AlsoTheirs(type):
    """The class of a class of ours that stands for its base of the same name: what is an instance, or a subclass, of
    that one counts as one of ours, whoever made it."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _theirs(cls)) or super().__instancecheck__(instance)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, _theirs(cls)) or super().__subclasscheck__(other)


def _theirs(cls: type) -> tuple[type, ...]:
    if cls.__module__.partition(".")[0] != __package__:
        return ()  # a class of the user's, derived from one of ours
    return tuple(base for base in cls.__mro__ if base.__name__ == cls.__name__ and type(base) is type)
