"""What is public says in its docstring what it takes and what it raises."""

from __future__ import annotations

import ast
import inspect
import multiprocessing
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import mpchannel
from mpchannel import connection, ipc, testing, workerpool
from mpchannel.events import Event, EventTarget

pytestmark = pytest.mark.once

OURS = {name for name in mpchannel.__all__ if not hasattr(multiprocessing, name)} | {"get_context"}


def methods_of(cls: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What users call of a class, and what we wrote of it."""
    for name in dir(cls):
        found = inspect.getattr_static(cls, name)
        function = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
        if inspect.isfunction(function) and function.__module__.startswith("mpchannel") and not name.startswith("_"):
            yield f"{cls.__name__}.{name}", function


def documented() -> dict[str, tuple[Callable[..., Any], str]]:
    """Each public function, method and constructor, with the docstring that has to tell of it."""
    modules = {mpchannel: OURS, **{module: set(module.__all__) for module in (ipc, connection, testing, workerpool)}}
    things = {getattr(module, name) for module, names in modules.items() for name in names if name != "ipc"}
    things = {type(each) if isinstance(each, EventTarget) else each for each in things}
    found: dict[str, tuple[Callable[..., Any], str]] = {}
    for each in things:
        if not getattr(each, "__module__", "").startswith("mpchannel"):
            continue  # of multiprocessing
        if isinstance(each, type):
            found |= {name: (function, inspect.getdoc(function) or "") for name, function in methods_of(each)}
            maker = each.__dict__.get("__init__") or each.__dict__.get("__new__")
            if not issubclass(each, NOT_MADE_BY_USERS):
                found[each.__name__] = (maker or each, inspect.getdoc(each) or "")
        elif callable(each):
            found[each.__name__] = (each, inspect.getdoc(each) or "")
    return found


NOT_MADE_BY_USERS = (Event, Exception, workerpool.PoolFuture, workerpool.PoolStream)
DOCUMENTED = documented()
NAMES = {part for name in DOCUMENTED for part in (name, name.rpartition(".")[2])}
REFERS = re.compile(r"``(?:Connection\.|MessagePort\.|WorkerPool\.)?(\w+)``")
STANDARD = {"result", "exception", "send_bytes", "recv_bytes", "recv_bytes_into"}  # the standard library tells the rest


def refers_to_another(name: str, text: str) -> bool:
    """Whether a docstring says in its first sentence that all is as for another name."""
    first = text.partition(". ")[0].partition("\n\n")[0]
    others = {other for other in REFERS.findall(first) if other in NAMES}
    return bool(others - {name.rpartition(".")[2]}) or name.rpartition(".")[2] in STANDARD


def parameters_of(function: Callable[..., Any]) -> list[str]:
    if isinstance(function, type):
        return []
    names = list(inspect.signature(function).parameters)
    return [name for name in names if name not in ("self", "cls") and not name.startswith("_")]


def raised_by(function: Callable[..., Any]) -> set[str]:
    """The names of the errors that stand in the very body of a function."""
    if isinstance(function, type):
        return set()
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    raised = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise))
    names = {each.func.id for each in raised if isinstance(each, ast.Call) and isinstance(each.func, ast.Name)}
    return {name for name in names if name[0].isupper()}  # not functions that make one


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_a_docstring_names_parameters_and_errors(name: str) -> None:
    function, text = DOCUMENTED[name]
    assert text.strip()
    if refers_to_another(name, text):
        return
    unnamed = [each for each in parameters_of(function) if not re.search(rf"[*`]\*?\*?{each}\b|\b{each}[*`]", text)]
    assert not unnamed, "parameters"
    assert not {each for each in raised_by(function) if f"``{each}``" not in text}, "errors"


def test_docstrings_are_looked_at() -> None:
    assert {"MessagePort.post_message", "Worker", "WorkerPool.submit", "Main.handle", "wrap", "Window"} <= set(
        DOCUMENTED
    )
    assert raised_by(DOCUMENTED["release"][0]) == {"TypeError"}
    assert parameters_of(DOCUMENTED["release"][0]) == ["proxy"]
