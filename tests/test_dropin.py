"""``import mpchannel as multiprocessing``: names, contexts, start-up, and what plain pickle cannot find."""

from __future__ import annotations

import multiprocessing
import multiprocessing.pool
import os
import pkgutil
import re
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import mpchannel

from . import children
from .children import run_script, running

SUBMODULES = sorted(each.name for each in pkgutil.iter_modules(multiprocessing.__path__) if "win32" not in each.name)
OURS = {"connection", "context", "process", "queues", "reduction", "sharedctypes", "pool", "managers"}


# Promises


def test_every_line_of_the_table_in_the_readme_names_tests_that_exist() -> None:
    root = Path(__file__).parents[1]
    page = (root / "README.md").read_text().split("## Coming from multiprocessing")[1].split("\n## ")[0]
    lines = [line for line in page.splitlines() if line.startswith("| ") and not line.endswith("| |")]
    assert len(lines) > 15
    tests = set(
        re.findall(r"^def (test_\w+)", "".join(each.read_text() for each in root.glob("tests/test_*.py")), re.M)
    )
    for line in lines:
        named = re.findall(r"`(test_\w+)`", line)
        assert named, f"no test stands behind: {line}"
        assert set(named) <= tests, f"unknown tests: {set(named) - tests}"


# Names


def test_every_public_name_of_multiprocessing_is_here() -> None:
    missing = [name for name in multiprocessing.__all__ if name not in mpchannel.__all__]
    assert missing == []
    assert [name for name in mpchannel.__all__ if not hasattr(mpchannel, name)] == []
    assert (mpchannel.SUBDEBUG, mpchannel.SUBWARNING) == (multiprocessing.SUBDEBUG, multiprocessing.SUBWARNING)


@pytest.mark.parametrize("name", SUBMODULES)
def test_every_submodule_can_be_imported_in_every_way_and_has_every_name(name: str) -> None:
    done = run_script(
        f"""
        import mpchannel.{name}
        from mpchannel import {name} as one
        import mpchannel as multiprocessing
        import multiprocessing.{name} as theirs
        import importlib

        assert mpchannel.{name} is one is importlib.import_module("mpchannel.{name}")
        missing = [name for name in vars(theirs) if not hasattr(one, name)]
        assert missing == [], missing
        assert (one is theirs) == ({name!r} not in {OURS!r})
        assert theirs.__name__ == theirs.__spec__.name == "multiprocessing.{name}"
        """
    )
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_submodules_are_there_without_an_import_of_their_own() -> None:
    done = run_script(
        """
        import mpchannel

        print(mpchannel.pool.ThreadPool(1).apply(abs, (-1,)), mpchannel.dummy.connection.__name__)
        """
    )
    assert (done.stdout, done.stderr) == ("1 multiprocessing.dummy.connection\n", "")


@pytest.mark.parametrize(
    "statement", ["import mpchannel.nothing", "from mpchannel import nothing", "mpchannel.nothing"]
)
def test_what_does_not_exist_is_missing_as_usual(statement: str) -> None:
    done = run_script(f"import mpchannel\n{statement}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(("ModuleNotFoundError", "ImportError", "AttributeError"))
    assert "nothing" in done.stderr.splitlines()[-1]


# Contexts


def test_the_start_methods_are_the_standard_librarys_and_its_state_is_left_alone() -> None:
    done = run_script(
        """
        import multiprocessing as theirs
        import mpchannel

        def report(results):
            results.send((mpchannel.get_start_method(), theirs.get_start_method(allow_none=True)))

        if __name__ == "__main__":
            assert mpchannel.get_start_method(allow_none=True) is None
            assert mpchannel.get_all_start_methods() == theirs.get_all_start_methods()
            results, into = mpchannel.Pipe(False)
            for method in ("spawn", "forkserver", "fork"):
                process = mpchannel.get_context(method).Process(target=report, args=(into,))
                process.start()
                assert results.recv()[0] == method
                process.join()
            assert mpchannel.get_start_method(allow_none=True) is None
            mpchannel.set_start_method("forkserver")
            process = mpchannel.Process(target=report, args=(into,))
            process.start()
            assert results.recv()[0] == "forkserver"
            process.join()
            try:
                mpchannel.set_start_method("fork")
            except RuntimeError as error:
                assert str(error) == "context has already been set"
            assert theirs.get_start_method(allow_none=True) is None
            theirs.set_start_method("spawn")
            assert mpchannel.get_start_method() == "forkserver"
            mpchannel.set_start_method(None, force=True)
            assert mpchannel.get_start_method() == theirs.get_all_start_methods()[0]
            print("fine")
        """
    )
    assert (done.stdout, done.stderr) == ("fine\n", "")


def test_a_context_gives_itself_and_unknown_methods_are_refused(context: Any) -> None:
    assert context.get_context() is context
    assert context.get_context("spawn") is mpchannel.get_context("spawn")
    for method in ("no such method", ""):
        with pytest.raises(ValueError, match="cannot find context for"):
            context.get_context(method)
    with pytest.raises(ValueError, match="cannot set start method of concrete context"):
        context.set_start_method("spawn")


def test_processes_of_both_packages_know_each_other(context: Any) -> None:
    gate, held = mpchannel.MessageChannel()
    with running(context.Process(target=children.end_when_told, args=(held, "return"), name="ours")) as process:
        assert gate.recv(20) == "ready"
        assert process in multiprocessing.active_children()
        assert process in mpchannel.active_children()
        gate.post_message("go")
    gate.close()
    assert mpchannel.current_process() is multiprocessing.current_process()


@pytest.mark.leaves("the heap of shared ctypes")
def test_locks_of_shared_values_are_of_the_default_context() -> None:
    done = run_script(
        """
        import mpchannel
        import mpchannel.sharedctypes

        def add(*values):
            for each in values:
                with each.get_lock():
                    each.value += 1

        if __name__ == "__main__":
            mpchannel.set_start_method("spawn")
            values = [mpchannel.Value("i"), mpchannel.sharedctypes.Value("i"), mpchannel.Array("c", 1)]
            values[2] = mpchannel.sharedctypes.synchronized(mpchannel.RawValue("i"))
            process = mpchannel.Process(target=add, args=values)
            process.start()
            process.join()
            print([each.value for each in values])
        """
    )
    assert (done.stdout, done.stderr) == ("[1, 1, 1]\n", "")


def test_pools_and_managers_by_their_classes_are_of_the_default_context() -> None:
    done = run_script(
        """
        import mpchannel, multiprocessing
        from mpchannel.managers import BaseManager, SharedMemoryManager, SyncManager
        from mpchannel.pool import Pool, ThreadPool

        class Counter:
            count = 0
            def add(self):
                self.count += 1
                return self.count

        class MyManager(BaseManager):
            pass

        MyManager.register("Counter", Counter)

        if __name__ == "__main__":
            mpchannel.set_start_method("spawn")
            with Pool(1) as pool:
                print(pool.apply(lambda: mpchannel.get_start_method()), type(pool._pool[0]).__name__)
                pool.terminate()
                pool.join()
            with MyManager() as manager:
                counter = manager.Counter()
                counter.add()
                print(counter.add(), type(manager._process).__name__)
            with SyncManager() as manager:
                print(manager.list([1, 2]), isinstance(manager, BaseManager), isinstance(manager, MyManager))
            with SharedMemoryManager() as manager:
                print(manager.ShareableList([3])[0])
            with mpchannel.Pool(1) as pool, ThreadPool(1) as threads, mpchannel.Manager() as manager:
                print([isinstance(each, Pool) for each in (pool, threads, manager)], issubclass(ThreadPool, Pool))
                print([isinstance(manager, each) for each in (SyncManager, BaseManager, MyManager)])
                for each in (pool, threads):
                    each.terminate()
                    each.join()
            print(multiprocessing.get_start_method(allow_none=True))
        """
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "spawn SpawnProcess",
        "2 SpawnProcess",
        "[1, 2] True False",
        "3",
        "[True, True, False] True",
        "[True, True, False]",
        "None",
    ]


# What plain pickle cannot find at the receiver

BY_VALUE = """
import dataclasses, enum, sys, threading
from concurrent.futures import ProcessPoolExecutor
import mpchannel as multiprocessing

@dataclasses.dataclass
class Point:
    x: int

class Colour(enum.Enum):
    RED = 1

class Oops(Exception):
    pass

def step(point):
    return Point(point.x + 1)

def same(thing):
    return thing

def fail(text):
    raise Oops(text)

def work(queue, connection, point):
    queue.put(step(point))
    connection.send([Colour.RED, Oops("sent"), point])

class Doubler(multiprocessing.Process):
    def __init__(self, connection):
        super().__init__()
        self.connection = connection

    def run(self):
        self.connection.send(2 * self.connection.recv())

context = multiprocessing.get_context(METHOD)
multiprocessing.set_start_method(METHOD)
for make in (context.Queue, context.JoinableQueue, context.SimpleQueue):
    queue = make()
    mine, theirs = context.Pipe()
    process = context.Process(target=work, args=(queue, theirs, Point(1)))
    process.start()
    assert queue.get() == Point(2)
    colour, error, point = mine.recv()
    assert colour is Colour.RED and type(error) is Oops and type(point) is Point
    process.join()
process = Doubler(theirs)
process.start()
mine.send(21)
assert mine.recv() == 42
process.join()
with context.Pool(2, initializer=lambda: None) as pool:
    assert pool.map(step, [Point(1), Point(2)]) == [Point(2), Point(3)]
    assert pool.apply(lambda value: value * 2, (4,)) == 8
    try:
        pool.apply(fail, ("in a pool",))
    except Oops as error:
        assert error.args == ("in a pool",)
with ProcessPoolExecutor(2, mp_context=context) as executor:
    assert executor.submit(step, Point(4)).result() == Point(5)
    assert list(executor.map(same, [Colour.RED])) == [Colour.RED]
    assert type(executor.submit(fail, "in an executor").exception()) is Oops
    assert "cannot pickle" in str(executor.submit(same, threading.Lock()).exception())

    def step(point):  # a cell that is run again
        return Point(point.x + 100)

    assert executor.submit(step, Point(4)).result() == Point(104)
print("fine")
"""


@pytest.mark.parametrize("way", ["piped", "-c"])
def test_what_is_defined_at_a_prompt_goes_to_processes_queues_pools_and_executors(start_method: str, way: str) -> None:
    script = BY_VALUE.replace("METHOD", repr(start_method))
    options = ["-"] if way == "piped" else ["-c", script]
    done = subprocess.run(
        [sys.executable, *options],
        input=script if way == "piped" else "",
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env=children.script_environment(),
    )
    assert (done.stdout, done.stderr) == ("fine\n", "")


def test_lambdas_and_nested_functions_are_targets_arguments_and_queue_items(context: Any) -> None:
    queue = context.SimpleQueue()
    offset = 7

    def target(function: Any) -> None:
        queue.put(lambda: function(1))

    with running(context.Process(target=target, args=(lambda value: value + offset,))):
        assert queue.get()() == 8
    queue.close()


def test_a_queue_that_cannot_pickle_something_says_what_and_goes_on(
    context: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    queue = context.Queue()
    queue.put(threading.Lock())
    queue.put("next")
    assert queue.get(timeout=20) == "next"
    assert "cannot pickle '_thread.lock' object" in capsys.readouterr().err
    queue.close()
    queue.join_thread()


def test_an_executor_with_our_context_takes_ports(context: Any) -> None:
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        assert executor.submit(children.identity, lambda: 3).result(30)() == 3


# Start-up that fails


@pytest.mark.parametrize("place", ["before the port", "behind the port"])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_child_that_cannot_load_its_arguments_loses_its_ports_and_says_why(method: str, place: str) -> None:
    done = run_script(
        f"""
        import mpchannel
        from tests import children

        mine, moving = mpchannel.MessageChannel()
        arguments = [children.CannotBeLoaded(), moving]
        if {place!r} == "behind the port":
            arguments.reverse()
        process = mpchannel.get_context({method!r}).Process(target=print, args=arguments, name="the child")
        process.start()
        event = mine.wait_closed(5)
        print(event.reason, event.pid == process.pid)
        process.join()
        print(process.exitcode)
        """
    )
    assert done.stdout == "undeliverable True\n1\n"
    assert done.stderr.count("Traceback") == 1
    assert "LookupError: it cannot be loaded\nthe child could not start" in done.stderr


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_main_module_that_cannot_be_imported_again_is_one_readable_error(method: str) -> None:
    done = run_script_file(
        f"""
        import mpchannel, sys

        if __name__ == "__main__":
            mine, moving = mpchannel.MessageChannel()
            process = mpchannel.get_context({method!r}).Process(target=print, args=(moving,))
            process.start()
            print(mine.wait_closed(20).reason)
            process.join()
            print(process.exitcode)
        else:
            raise ImportError("only once")
        """
    )
    assert done.stdout == "undeliverable\n1\n"
    assert done.stderr.count("Traceback") == 1
    assert "ImportError: only once" in done.stderr
    assert 'if __name__ == "__main__":' in done.stderr


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_an_exception_hook_kept_from_the_start_does_not_blame_the_start(method: str) -> None:
    done = run_script_file(
        f"""
        import mpchannel, sys

        kept = sys.excepthook

        def work():
            try:
                raise LookupError("much later")
            except LookupError:
                kept(*sys.exc_info())

        if __name__ == "__main__":
            process = mpchannel.get_context({method!r}).Process(target=work)
            process.start()
            process.join()
            print(process.exitcode)
        """
    )
    assert done.stdout == "0\n"
    assert "LookupError: much later" in done.stderr
    assert "could not start" not in done.stderr


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_class_may_say_itself_how_it_is_pickled(method: str) -> None:
    done = run_script_file(
        f"""
        import mpchannel

        context = mpchannel.get_context({method!r})

        class Odd(context.Process):
            def run(self):
                print(self.word, self._args[0](), flush=True)

            def __reduce_ex__(self, protocol):
                self.word = "reduced"
                return super().__reduce_ex__(protocol)

        if __name__ == "__main__":
            process = Odd(args=(lambda: "by value",))
            process.start()
            process.join()
        """
    )
    assert (done.stdout, done.stderr) == ("reduced by value\n", "")


def test_a_script_without_a_guard_is_told_so_and_ends() -> None:
    done = run_script_file(
        """
        import mpchannel

        mpchannel.set_start_method("spawn")
        process = mpchannel.Process(target=print)
        process.start()
        process.join()
        print(process.exitcode)
        """
    )
    assert done.stdout == "1\n"
    assert "start processes only under `if __name__" in done.stderr


def run_script_file(script: str) -> Any:
    """As ``run_script``, from a file: what a spawned child imports as its main module."""
    return run_script(
        f"""
        import os, subprocess, sys, tempfile, textwrap

        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "script.py")
            with open(path, "w") as file:
                file.write(textwrap.dedent({script!r}))
            sys.exit(subprocess.run([sys.executable, path], check=False).returncode)
        """
    )


# Ports through a manager


@pytest.mark.leaves("resource sharer")
def test_ports_move_into_a_managers_process_and_out_again(context: Any) -> None:
    with context.Manager() as manager:
        mail, queue = manager.list(), manager.Queue()
        for put, get in ((mail.append, lambda: mail[0]), (queue.put, queue.get)):
            mine, moving = mpchannel.MessageChannel()
            put(moving)
            assert moving.detached
            arrived = get()
            mine.post_message("hello")
            assert arrived.recv(20) == "hello"
            mine.close()
            arrived.close()
        mine, moving = mpchannel.MessageChannel()
        mail.append(moving)
    assert mine.wait_closed(20).reason in ("exited", "died", "collected")  # with the manager's process


def test_a_port_in_a_pools_initializer_goes_to_the_one_worker_there_is(context: Any) -> None:
    mine, moving = mpchannel.MessageChannel()
    with context.Pool(1, initializer=children.post_pid_on, initargs=(moving,)) as pool:
        assert mine.recv(20) == pool.apply(os.getpid)
        pool.close()
        pool.join()
    mine.close()


def test_a_port_in_the_initializer_of_several_workers_is_refused_and_nothing_hangs(context: Any) -> None:
    mine, moving = mpchannel.MessageChannel()
    with pytest.raises(mpchannel.DataCloneError, match=r"an argument of the process is a port that was given to"):
        context.Pool(2, initializer=children.post_pid_on, initargs=(moving,))
    mine.close()
