"""Where in a message the part is that cannot be pickled: ``message['jobs'][3].lock``.

House rule: only asked after pickling failed, so it may take its time, within a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, ModuleType
from typing import Any, Final

_BUDGET: Final = 10_000  # parts looked at before the path found so far has to do


def find_culprit(message: Any, why_not: Callable[[Any], Exception | None], whole: type) -> tuple[str, Exception | None]:
    """(path, error) of the innermost part of *message* that *why_not* gives an error for; none is looked for inside a
    *whole*.
    """
    path, value, cause, why, budget = "message", message, why_not(message), None, _BUDGET
    seen = {id(value)}
    try:
        while not isinstance(value, whole):
            for name, part in _parts(value):
                budget -= 1
                if budget < 0:
                    return path, cause
                why = None if id(part) in seen else why_not(part)
                if why is not None:
                    path, value, cause = name.format(path), part, why
                    seen.add(id(part))
                    break
            else:
                break
        return path, cause
    finally:
        del cause, why  # their tracebacks lead to this frame: a cycle, which would keep the message


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a value, each with a pattern that makes its path from the value's."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield "{}[" + _braced(key) + "]", part
            yield "the key " + _braced(key) + " of {}", key
    elif isinstance(value, (list, tuple)):
        for place, part in enumerate(value):
            yield f"{{}}[{place}]", part
    elif isinstance(value, (set, frozenset)):
        for part in value:
            yield "the member " + _braced(part) + " of {}", part
    elif isinstance(value, partial):
        yield "{}.func", value.func
        for place, part in enumerate(value.args):
            yield f"{{}}.args[{place}]", part
        for name, part in value.keywords.items():
            yield f"{{}}.keywords[{name!r}]", part
    elif isinstance(value, FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=False):
            yield f"{name} (captured by {{}})", cell.cell_contents
        for name in value.__code__.co_names:
            if name in value.__globals__:
                yield f"{name} (used by {{}})", value.__globals__[name]
    elif not isinstance(value, (type, str, bytes, ModuleType)):
        names = [name for kind in type(value).__mro__ for name in _slots_of(kind)]
        for name in (*names, *getattr(value, "__dict__", ())):
            part = getattr(value, name, None)
            if part is not None:
                yield f"{{}}.{name}", part


def _slots_of(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))


def _braced(value: Any) -> str:
    text = repr(value)
    if len(text) > 60:
        text = text[:57] + "..."
    return text.replace("{", "{{").replace("}", "}}")
