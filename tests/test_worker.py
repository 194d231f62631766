"""Workers: start, messages, errors, exit, lifetime, and that none outlives whoever started it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import mpchannel
from mpchannel import Worker

from . import workers
from .children import run_script, script_environment


@contextmanager
def ending(worker: Worker, exitcode: int = 0) -> Iterator[Worker]:
    """The worker ends by itself, as said."""
    try:
        yield worker
        worker.join(20)
        assert worker.exitcode == exitcode
    finally:
        if worker.exitcode is None:
            os.kill(worker.pid, signal.SIGKILL)
            worker.join(20)


class Log:
    """Events in the order in which they came, and a wait for the last."""

    def __init__(self, worker: Worker, *types: str) -> None:
        self.events: list[Any] = []
        self.over = threading.Event()
        for each in (*types, "exit"):
            worker.on(each, self.hear)

    def hear(self, event: Any) -> None:
        self.events.append(event)
        if event.type == "exit":
            self.over.set()

    def wait(self) -> list[Any]:
        assert self.over.wait(20)
        return self.events


# Messages


def test_messages_wait_for_the_worker_and_come_in_order(context: Any) -> None:
    with ending(Worker(workers.echo, 1, "a", data={"key": [2]}, context=context)) as worker:
        for number in range(1000):
            assert worker.post_message(number)
        assert [worker.recv(20) for _ in range(1000)] == [(number, 1, "a", {"key": [2]}) for number in range(1000)]
        worker.post_message("stop")
    assert worker.post_message("too late") is False
    with pytest.raises(mpchannel.PortClosedError):
        worker.recv(1)


def test_ports_move_in_arguments_in_data_and_in_messages(context: Any) -> None:
    pairs = [mpchannel.MessageChannel() for _ in range(3)]
    data = {"ports": [pairs[1].port2]}
    worker = Worker(workers.give_back, [pairs[0].port2], data=data, transfer=data["ports"], context=context)
    with ending(worker):
        assert pairs[0].port2.detached
        assert pairs[1].port2.detached
        worker.post_message("with a port", [pairs[2].port2])
        event = worker.receive(20)
        assert event.data == "with a port"
        for pair, port in zip(pairs, event.ports, strict=True):
            port.post_message("it came back")
            assert pair.port1.recv(20) == "it came back"
            port.close()
            pair.port1.close()


def test_a_port_goes_from_one_worker_to_another(context: Any) -> None:
    mine, theirs = mpchannel.MessageChannel()
    with ending(Worker(workers.echo, context=context)) as first, ending(Worker(workers.talk, mine, context=context)):
        first.post_message("pass it on", [theirs])
        port = first.receive(20).ports[0]
        port.post_message("directly")
        assert port.recv(20) == "directly"
        port.close()
        first.post_message("stop")


def test_listening_starts_the_queue_and_events_name_the_worker(context: Any) -> None:
    messages = [None, [2], *range(200)]  # more than are dispatched in one turn
    worker = Worker(workers.post, *messages, context=context)
    with ending(worker):
        worker.join(20)
        events = Log(worker, "message").wait()
    assert [event.data for event in events[:-1]] == messages  # before the exit
    assert (events[-1].type, events[-1].exitcode) == ("exit", 0)
    assert all(event.target is worker for event in events)


def test_a_message_that_cannot_be_loaded_is_a_messageerror(context: Any) -> None:
    with ending(Worker(workers.post_what_cannot_be_loaded, context=context)) as worker:
        bad, good, _ = Log(worker, "messageerror", "message").wait()
    assert (bad.type, bad.target, type(bad.error)) == ("messageerror", worker, mpchannel.MessageError)
    assert (good.type, good.data) == ("message", "good")


def test_on_a_loop_events_come_on_the_loop() -> None:
    async def main() -> list[Any]:
        here = threading.get_ident()
        over = asyncio.get_running_loop().create_future()
        worker = Worker(workers.echo)
        threads = []

        async def hear(event: Any) -> None:
            threads.append(threading.get_ident() == here)
            worker.post_message("stop")

        worker.onmessage = hear
        worker.onexit = over.set_result
        worker.post_message(1)
        event = await asyncio.wait_for(over, 20)
        return [*threads, event.exitcode]

    assert asyncio.run(main()) == [True, 0]

    async def pull() -> Any:
        with Worker(workers.echo) as worker:
            worker.post_message(1)
            return await worker.arecv()

    assert asyncio.run(pull()) == (1, None)


def test_there_is_no_parent_port_outside_of_workers(context: Any) -> None:
    assert mpchannel.parent_port() is mpchannel.worker_data() is None
    with ending(Worker(workers.ask_in_a_forked_process, data=1, context=context)) as worker:
        assert worker.recv(20) == (None, None)


# Failures


def test_an_exception_comes_home_as_itself_with_its_traceback(context: Any) -> None:
    with ending(Worker(workers.fail, LookupError("at home"), context=context), 1) as worker:
        error, end = Log(worker, "error").wait()
    assert type(error.error) is LookupError
    assert error.error.args == ("at home",)
    assert isinstance(error.error.__cause__, mpchannel.RemoteError)
    assert "in fail" in str(error.error.__cause__)
    assert end.exitcode == 1


def test_an_exception_that_cannot_be_loaded_comes_as_text(context: Any) -> None:
    with ending(Worker(workers.fail, context=context), 1) as worker:
        error, _ = Log(worker, "error").wait()
    assert isinstance(error.error, mpchannel.RemoteError)
    assert "Oops: cannot be loaded, 1" in str(error.error)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("EndsWhoLoadsIt", mpchannel.RemoteError), ("Refuses", workers.Refuses), ("Base", workers.Base)],
)
def test_odd_exceptions_are_told_as_well(context: Any, name: str, kind: type[BaseException]) -> None:
    with ending(Worker(workers.fail_as, name, context=context), 1) as worker:
        error, end = Log(worker, "error").wait()
    assert type(error.error) is kind
    assert end.exitcode == 1


def test_an_exception_that_listens_while_it_is_loaded_is_told_to_each_once(context: Any) -> None:
    worker = Worker(workers.fail, workers.AsksWhoLoadsIt(), context=context)
    heard: list[Any] = []
    free: list[bool] = []

    def ask() -> None:
        worker.on("exit", heard.append).on("error", heard.append)
        thread = threading.Thread(target=worker.on, args=("error", heard.append), daemon=True)
        thread.start()
        thread.join(2)
        free.append(not thread.is_alive())  # else a lock is held while this runs

    workers.AsksWhoLoadsIt.ask = staticmethod(ask)
    try:
        with ending(worker, 1):
            error, end = Log(worker, "error").wait()
            worker.join(20)
    finally:
        del workers.AsksWhoLoadsIt.ask
    assert type(error.error) is workers.AsksWhoLoadsIt
    assert free == [True]
    assert [event.type for event in heard] == ["error", "exit"]
    assert end.exitcode == 1


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_a_listener_that_ends_the_loop_costs_no_other_listener_its_event(kind: type[BaseException]) -> None:
    heard: list[Any] = []

    async def main() -> None:
        def end_the_loop(event: Any) -> None:
            raise kind

        worker = Worker(workers.fail)
        worker.on("error", end_the_loop).on("error", heard.append).on("exit", heard.append)
        await asyncio.sleep(20)

    with pytest.raises(kind):
        asyncio.run(main())
    assert [event.type for event in heard] == ["error", "exit"]


def test_the_exit_is_told_although_the_loop_that_got_messages_is_closed() -> None:
    worker = Worker(workers.give_back, [], data={"ports": []})

    async def listen() -> None:
        worker.onmessage = print

    asyncio.run(listen())
    with ending(worker):
        worker.post_message("unread")
        assert Log(worker).wait()[-1].exitcode == 0


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda context: Worker("tests.nowhere:f", context=context), "No module named 'tests.nowhere'"),
        (lambda context: Worker("tests.workers:f", context=context), "no attribute 'f'"),
        (lambda context: Worker(workers.echo, workers.CannotBeLoaded(), context=context), "not a number"),
        (lambda context: Worker(workers.echo, data=workers.CannotBeLoaded(), context=context), "not a number"),
    ],
)
def test_a_worker_that_cannot_start_says_why(context: Any, make: Callable[[Any], Worker], text: str) -> None:
    with ending(make(context), 1) as worker:
        error, end = Log(worker, "error").wait()
    assert isinstance(error.error, mpchannel.WorkerStartError)
    assert text in str(error.error)
    assert "Traceback" in str(error.error.__cause__)
    assert end.exitcode == 1


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"], indirect=True)
@pytest.mark.parametrize("first", ["", "if __name__ != '__main__': raise LookupError('not here')"])
def test_a_main_module_that_cannot_be_imported_is_an_error_with_its_traceback(
    start_method: str, first: str, tmp_path: Path
) -> None:
    script = f"""
        {first}
        import mpchannel

        context = mpchannel.get_context("{start_method}")
        context.set_forkserver_preload([])
        worker = mpchannel.Worker(print, context=context)
        worker.onerror = lambda event: print(repr(event.error), repr(event.error.__cause__), sep="\\n")
        worker.join(20)
    """
    (tmp_path / "script.py").write_text(textwrap.dedent(script))
    program = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, env=script_environment(), check=False)
    error, cause = done.stdout.splitlines()
    assert error.startswith("WorkerStartError(")
    assert "__main__" in error
    assert cause.startswith("RemoteError(")
    assert "Traceback" in cause
    assert "script.py" in cause
    if first:
        assert error.rstrip("')\"").endswith("LookupError: not here")
    assert done.stderr.count("Traceback") == 1  # there too, from the child itself


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        ((3,), {}, TypeError, "must be a callable"),
        (("nocolon",), {}, ValueError, "package.module:function"),
        ((print,), {"name": 3}, TypeError, "name must be a str"),
        ((print,), {"context": "none such"}, ValueError, "none such"),
        ((print, threading.Lock()), {}, mpchannel.DataCloneError, "lock"),
        ((print,), {"data": [threading.Lock()]}, mpchannel.DataCloneError, "lock"),
        ((print,), {"transfer": 3}, TypeError, "iterable of ports"),
        ((print,), {"transfer": [3]}, mpchannel.DataCloneError, "cannot be transferred"),
    ],
)
def test_bad_arguments_raise_at_once_and_move_nothing(
    channel: Any, arguments: Any, options: Any, error: type[Exception], text: str
) -> None:
    mine, moving = channel
    with pytest.raises(error, match=text):
        Worker(*arguments, moving, **options)
    moving.post_message("still here")
    assert mine.recv(5) == "still here"


def test_a_port_in_data_must_be_listed_and_only_once(channel: Any) -> None:
    mine, moving = channel
    with pytest.raises(mpchannel.DataCloneError, match="not in the transfer list"):
        Worker(print, data=[moving])
    with pytest.raises(mpchannel.DataCloneError, match="only once"):
        Worker(print, moving, data=[moving], transfer=[moving])
    assert not moving.detached
    assert not mine.closed


def test_error_and_exit_reach_late_listeners_once(context: Any) -> None:
    worker = Worker(workers.fail, context=context)
    worker.join(20)
    first, second = Log(worker, "error"), Log(worker, "error")
    for log in (first, second):
        assert [event.type for event in log.wait()] == ["error", "exit"]
    third = Log(worker, "error")
    assert [event.type for event in third.wait()] == ["error", "exit"]
    assert [event.type for event in first.events] == ["error", "exit"]


def test_join_waits_until_listeners_were_told(context: Any) -> None:
    for _ in range(10):
        worker = Worker(workers.post, 1, context=context)
        events: list[Any] = []
        worker.onmessage = worker.onexit = events.append
        worker.join(20)
        assert [event.type for event in events] == ["message", "exit"]


def test_join_waits_until_late_listeners_were_told(context: Any) -> None:
    worker = Worker(workers.fail, context=context)
    worker.join(20)
    heard: list[str] = []

    def hear(event: Any) -> None:
        time.sleep(0.2)
        heard.append(event.type)

    for type in ("error", "exit"):
        worker.on(type, hear)
        worker.join(20)
        assert heard.pop() == type
    worker.on("error", lambda event: hear(event)).join(20)
    assert heard == ["error"]


# Lifetime


def test_a_worker_ends_when_nobody_listens_any_more(context: Any) -> None:
    with ending(Worker(workers.answer_once, context=context)) as worker:
        with pytest.raises(TimeoutError):
            worker.recv(0.5)
        assert worker.exitcode is None  # idle, and alive
        worker.post_message("one")
        assert worker.recv(20) == "one"


def test_a_raising_listener_does_not_end_a_worker(context: Any) -> None:
    with ending(Worker(workers.fail_in_a_listener, context=context)) as worker:
        for message in ("first", "last"):
            worker.post_message(message)
            assert worker.recv(20) == message


def test_a_listener_that_closed_the_last_port_runs_to_its_end(context: Any) -> None:
    with ending(Worker(workers.close_and_finish_slowly, context=context)) as worker:
        port = worker.receive(20).ports[0]
        worker.post_message("go")
        assert port.recv(20) == "finished"
        port.close()


def test_a_coroutine_function_is_a_target(context: Any) -> None:
    with ending(Worker(workers.answer_in_a_coroutine, context=context)) as worker:
        for message in ("awaited", "listened to"):
            worker.post_message(message)
            assert worker.recv(20) == message


def test_a_worker_lives_for_its_own_workers(context: Any) -> None:
    with ending(Worker(workers.start_a_worker, context=context)) as worker:
        port = worker.receive(20).ports[0]
        port.post_message("from the grandparent")
        assert port.recv(20) == "from the grandparent"
        assert worker.exitcode is None
        port.close()


def test_a_worker_that_does_not_live_for_its_own_takes_them_along(context: Any) -> None:
    with ending(Worker(workers.start_a_worker, True, context=context)) as worker:
        port = worker.receive(20).ports[0]
        assert port.wait_closed(20) is not None
        port.close()


def test_a_worker_nobody_refers_to_goes_on(channel: Any) -> None:
    mine, moving = channel
    Worker(workers.talk, moving)
    gc.collect()
    mine.post_message("are you there?")
    assert mine.recv(20) == "are you there?"
    mine.close()


def test_terminate_ends_a_worker_that_ignores_it(context: Any) -> None:
    with Worker(workers.ignore_sigterm, context=context) as worker:
        assert worker.recv(20) == "ready"
        log = Log(worker, "error")
    assert worker.exitcode == -signal.SIGKILL
    assert [event.type for event in log.wait()] == ["exit"]
    assert "killed by SIGKILL" in repr(worker)
    worker.terminate()  # again: nothing


def test_terminate_ends_what_ignores_it_although_the_worker_does_not(context: Any) -> None:
    with Worker(workers.leave_one_that_ignores_sigterm, context=context) as worker:
        left = worker.recv(20)
    try:
        assert worker.exitcode == -signal.SIGTERM
        deadline = time.monotonic() + 5
        while _is_running(left):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        with suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)


def test_a_worker_that_is_ended_before_it_began(context: Any) -> None:
    with Worker(workers.echo, context=context) as worker:
        pass
    assert [event.type for event in Log(worker, "error").wait()] == ["exit"]  # as asked: no error
    worker = Worker(workers.echo, context=context)
    os.kill(worker.pid, signal.SIGSTOP)  # or it might have begun
    os.kill(worker.pid, signal.SIGKILL)
    events = Log(worker, "error").wait()
    assert events[-1].exitcode == -signal.SIGKILL
    if len(events) == 2:
        assert "killed by SIGKILL" in str(events[0].error)


def test_sys_exit_gives_the_exit_code_and_is_no_error(context: Any) -> None:
    worker = Worker(sys.exit, 3, context=context)
    assert [(event.type, event.exitcode) for event in Log(worker, "error").wait()] == [("exit", 3)]


FAMILY = """
    import sys, time
    import mpchannel
    from tests import workers

    if __name__ == "__main__":
        mpchannel.set_start_method(sys.argv[1])
        worker = mpchannel.Worker(workers.found_a_family)
        try:
            print(*worker.recv(30), flush=True)
            {then}
        except KeyboardInterrupt:
            print("interrupted")
"""


@pytest.mark.parametrize("how", ["killed", "ends", "interrupted"])
def test_no_worker_and_no_process_of_one_outlives_the_parent(start_method: str, how: str) -> None:
    script = textwrap.dedent(FAMILY).format(then="pass" if how == "ends" else "time.sleep(60)")
    program = subprocess.Popen(
        [sys.executable, "-W", "always", "-c", script, start_method],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=script_environment(),
        start_new_session=True,
    )
    assert program.stdout is not None
    assert program.stderr is not None
    with program:
        pids = [int(word) for word in program.stdout.readline().split()]
        assert len(pids) == 3
        if how == "killed":
            program.kill()
        elif how == "interrupted":
            os.killpg(program.pid, signal.SIGINT)  # as a terminal does
        deadline = time.monotonic() + 5
        while left := [pid for pid in pids if _is_running(pid)]:
            assert time.monotonic() < deadline, f"left: {left}"
            time.sleep(0.01)
        assert program.wait(20) == (-signal.SIGKILL if how == "killed" else 0)
        assert program.stdout.read() == ("interrupted\n" if how == "interrupted" else "")
        assert program.stderr.read() == ""


@pytest.mark.parametrize("first", ["pass", "multiprocessing.resource_tracker.ensure_running()"])
def test_an_interrupt_is_held_back_by_the_very_first_start_and_by_nothing_after_it(
    start_method: str, first: str
) -> None:
    done = run_script(
        f"""
        import multiprocessing.resource_tracker
        import mpchannel
        from tests import workers

        {first}
        context = mpchannel.get_context("{start_method}")
        start = context.Process.start
        context.Process.start = lambda process: (start(process), workers.tell_whether_interrupts_are_held_back())
        mpchannel.Worker(workers.tell_whether_interrupts_are_held_back, context=context).join(20)
        workers.tell_whether_interrupts_are_held_back()
        context.Process.start = start
        process = context.Process(target=workers.tell_whether_interrupts_are_held_back)
        process.start()
        process.join()
        """
    )
    assert done.stderr == ""
    assert done.stdout.split() == ["True", "False", "False", "False"]


def _is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_threads_that_ask_at_once_are_told_the_same(context: Any) -> None:
    for _ in range(10):
        worker = Worker(workers.ignore_sigterm, context=context)
        codes: list[Any] = []
        threads = [threading.Thread(target=lambda: (worker.join(20), codes.append(worker.exitcode))) for _ in range(4)]  # noqa: B023
        log = Log(worker)
        for each in threads:
            each.start()
        os.kill(worker.pid, signal.SIGKILL)
        for each in threads:
            each.join()
        assert codes == [-signal.SIGKILL] * 4
        assert log.wait()[0].exitcode == -signal.SIGKILL


@pytest.mark.parametrize("seen", ["polled", "joined", "joined and told", "told"])
@pytest.mark.parametrize("listening", [False, True])
def test_what_an_ended_worker_had_open_is_closed_without_a_collection(context: Any, seen: str, listening: bool) -> None:
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        over, late = threading.Event(), threading.Event()
        worker = Worker(workers.post_and_fail, "unread", context=context)
        if listening:
            worker.onmessage = print
        if "told" in seen:
            worker.onerror = print
            worker.onexit = lambda event: over.set()
        if "joined" in seen:
            worker.join(20)
        while "polled" in seen and worker.exitcode is None:
            time.sleep(0.01)
        if "told" in seen:
            assert over.wait(20)
        assert len(os.listdir("/proc/self/fd")) <= before + 4  # its ports, and multiprocessing's sentinel
        if not listening:
            assert worker.recv(5) == "unread"
        assert worker.on("error", print).on("exit", lambda event: late.set())
        assert late.wait(20)
        del worker
        deadline = time.monotonic() + 5
        while len(os.listdir("/proc/self/fd")) > before:  # the delivery thread may still be on its way out of it
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        gc.enable()


def test_two_hundred_starts_and_ends_leave_nothing() -> None:
    for number in range(200):
        worker = Worker(workers.echo, context="fork")
        if number % 3 == 0:
            worker.post_message("stop")
            worker.join(20)
            assert worker.exitcode == 0
        elif number % 3 == 1:
            worker.terminate()
            worker.join(20)
        else:
            os.kill(worker.pid, signal.SIGKILL)
            worker.join(20)
