"""What every test has: a guard that nothing is left behind, and the start methods.

Functions that run in child processes are in ``children``, which imports nothing but the package: a spawned child
imports the module of its target, and should not import pytest for that.
"""

from __future__ import annotations

import fcntl
import gc
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import mpchannel
from mpchannel import testing
from mpchannel._recycle import give_back

START_METHODS = ("fork", "spawn", "forkserver")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # run in the background; programs under test inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "row(*ids): the rows of the behaviour tables that a test stands for")
    config.addinivalue_line("markers", "soak: takes an hour; only when asked for, with -m soak")
    config.addinivalue_line("markers", "once: on one Python is enough; left out where MPCHANNEL_ONCE is `done`")
    config.addinivalue_line("markers", "leaves(why): uses what stays until the process ends")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What takes long and is hardly an affair of the version is tested on the first Python only: `.ci/run` says so."""
    if os.environ.get("MPCHANNEL_ONCE") == "done":
        again = [item for item in items if item.get_closest_marker("once")]
        config.hook.pytest_deselected(items=again)
        items[:] = [item for item in items if not item.get_closest_marker("once")]


@pytest.fixture(params=START_METHODS)
def start_method(request: pytest.FixtureRequest) -> str:
    """Each start method in turn."""
    return str(request.param)


@pytest.fixture
def context(start_method: str) -> Any:
    """mpchannel's context of each start method: ``context.Process``."""
    return mpchannel.get_context(start_method)


@pytest.fixture
def memory_to_itself(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No other test that has this fixture runs at the same time, in any of pytest-xdist's workers: for tests that need
    much memory, or look at how much the whole system uses.
    """
    with open(tmp_path_factory.getbasetemp().parent / "memory.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture
def channel() -> Iterator[tuple[mpchannel.MessagePort[Any, Any], mpchannel.MessagePort[Any, Any]]]:
    """Two connected ports; closed afterwards if they are still here."""
    port1, port2 = mpchannel.MessageChannel()
    yield port1, port2
    port1.close()
    port2.close()


@pytest.fixture(params=(False, True), ids=("forward", "backward"))
def ends(request: pytest.FixtureRequest, channel: tuple[Any, Any]) -> tuple[Any, Any]:
    """The two ends of a channel, in both directions: what holds for one must hold for the other."""
    return channel[::-1] if request.param else channel


# The guard


def _settled_helpers() -> None:
    """Start what lives as long as the process, so that it is part of every baseline."""
    multiprocessing.resource_tracker.ensure_running()
    multiprocessing.forkserver.ensure_running()
    done = threading.Event()
    port1, port2 = mpchannel.MessageChannel()
    port2.onclose = lambda event: done.set()
    port1.close()
    assert done.wait(10)


def _belongings() -> dict[str, set[Any]]:
    helpers = ("QueueFeederThread",)
    return {
        "descriptors": set(testing._descriptors().items()),
        "threads": {each.name for each in threading.enumerate() if each.name not in helpers},
        "children": testing._children(),
    }


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Descriptors (anonymous memory among them), threads and child processes are the same after each test as before.

    ``@pytest.mark.leaves("why")`` is for tests of multiprocessing's resource sharer, whose thread and listener stay.
    """
    if "leaves" in request.keywords:
        yield
        return
    _settled_helpers()
    give_back(all_of_it=True)  # what is kept for large messages; test_recycle looks at when it goes by itself
    gc.collect()
    gc.freeze()  # what is here already is not looked at again, and again: half the time of the whole suite
    before = _belongings()
    yield
    give_back(all_of_it=True)
    deadline = time.monotonic() + 5
    left: dict[str, set[Any]] = {}
    while True:
        gc.collect()
        multiprocessing.active_children()  # reaps
        after = _belongings()
        left = {kind: after[kind] - before[kind] for kind in after if after[kind] - before[kind]}
        if not left:
            return
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: {left}")
        time.sleep(0.01)
