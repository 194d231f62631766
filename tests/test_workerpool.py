"""``WorkerPool``: calls, streams, stopping, death, errors, progress, and that nothing is left or lost."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import multiprocessing.connection
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpchannel
from mpchannel import PortClosedError, WorkerDied, WorkerPool, WorkerStartError, _clone, workerpool
from mpchannel._claims import Claims

from . import pool_tasks as tasks


@contextmanager
def two(context: Any, **options: Any) -> Iterator[WorkerPool]:
    with WorkerPool(2, context=context, **options) as pool:
        yield pool


def gates(count: int) -> list[tuple[Any, Any]]:
    return [tuple(mpchannel.MessageChannel()) for _ in range(count)]


# Calls


def test_calls_are_answered_each_by_its_own_result(context: Any) -> None:
    with two(context) as pool:
        assert pool.submit(tasks.square, number=7).result(20) == 49
        futures = [pool.submit(tasks.square, number) for number in range(300)]
        assert [future.result(20) for future in futures] == [number**2 for number in range(300)]
        assert len({pool.submit(tasks.own_pid).result(20) for _ in range(20)}) <= 2
        assert list(concurrent.futures.as_completed(futures, 20))


def test_two_calls_run_at_the_same_time_and_the_third_waits(context: Any) -> None:
    ports = gates(3)
    with two(context) as pool:
        futures = [pool.submit(tasks.hold, theirs, place) for place, (_, theirs) in enumerate(ports)]
        pids = {mine.recv(20) for mine, _ in ports[:2]}
        assert len(pids) == 2
        assert not ports[2][0].poll(0.1)
        assert [future.running() for future in futures] == [True, True, False]
        assert "2 of 2 workers busy" in repr(pool)
        ports[1][0].post_message("go on")
        assert ports[2][0].recv(20) in pids
        for mine, _ in (ports[0], ports[2]):
            mine.post_message("go on")
        assert [future.result(20) for future in futures] == [0, 1, 2]
    for mine, _ in ports:
        mine.close()


def test_map_is_in_order_and_lazy(context: Any) -> None:
    taken = []

    def numbers() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    with two(context) as pool:
        results = pool.map(tasks.square, numbers(), chunksize=3, buffersize=5)
        assert len(taken) == 15
        assert [next(results) for _ in range(4)] == [0, 1, 4, 9]
        assert len(taken) == 21
        results.close()  # type: ignore[attr-defined]
        assert list(pool.map(tasks.square, range(100), chunksize=7)) == [number**2 for number in range(100)]
        assert list(pool.map(divmod, [7, 9], [2, 4])) == [(3, 1), (2, 1)]
        with pytest.raises(ZeroDivisionError):
            list(pool.map(divmod, [1], [0]))


def test_arrays_and_ports_are_arguments_and_results(context: Any) -> None:
    mine, theirs = mpchannel.MessageChannel()
    array = np.arange(300_000.0)
    with two(context) as pool, mine:
        assert np.array_equal(pool.submit(np.negative, array).result(20), -array)
        port = pool.submit(tasks.answer_through, theirs).result(20)
        assert theirs.detached
        assert mine.recv(20) == "from the task"
        assert port.recv(20) == "from the result's port"
        port.close()


def test_functions_by_value(context: Any) -> None:
    factor = 3
    with two(context) as pool:
        assert list(pool.map(lambda number: number * factor, range(5))) == [0, 3, 6, 9, 12]


def test_futures_are_awaited_from_asyncio(context: Any) -> None:
    async def main(pool: WorkerPool) -> list[int]:
        return await asyncio.gather(*(pool.submit(tasks.square, number) for number in range(50)))  # type: ignore[arg-type]

    with two(context) as pool:
        assert asyncio.run(main(pool)) == [number**2 for number in range(50)]


def test_workers_have_state_and_are_named_and_replaced_after_so_many_calls(context: Any) -> None:
    with two(context, initializer=tasks.initialize, initargs=("key", [1]), max_tasks_per_child=3) as pool:
        assert pool.submit(tasks.state, "key").result(20) == [1]
    with WorkerPool(1, context=context, max_tasks_per_child=3) as pool:
        pids = [pool.submit(tasks.own_pid).result(20) for _ in range(9)]
    assert [len(set(pids[start : start + 3])) for start in (0, 3, 6)] == [1, 1, 1]
    assert len(set(pids)) == 3


# Errors


def test_exceptions_come_home_with_notes_groups_and_traceback(context: Any) -> None:
    with two(context) as pool:
        error = pool.submit(tasks.fail, "a text").exception(20)
        assert isinstance(error, ExceptionGroup)
        assert [(type(each), each.args) for each in error.exceptions] == [
            (LookupError, ("a text",)),
            (ValueError, ("a text",)),
        ]
        assert error.exceptions[0].__notes__ == ["a note"]
        assert "in fail" in str(error.__cause__)
        assert pool.submit(tasks.square, 2).result(20) == 4


def test_what_cannot_be_sent_or_loaded_fails_that_call_only(context: Any) -> None:
    with two(context) as pool:
        with pytest.raises(mpchannel.DataCloneError, match="lock"):
            pool.submit(tasks.ignore, threading.Lock())
        with pytest.raises(mpchannel.DataCloneError, match="lock"):
            pool.submit(tasks.return_a_lock).result(20)
        with pytest.raises(ValueError, match="not a number"):
            pool.submit(tasks.ignore, tasks.CannotBeLoaded()).result(20)
        with pytest.raises(mpchannel.MessageError, match="not a number"):
            pool.submit(tasks.return_what_cannot_be_loaded).result(20)
        assert pool.submit(tasks.square, 2).result(20) == 4


def test_a_failing_initializer_fails_all_calls_with_its_text_and_is_not_tried_for_ever(context: Any) -> None:
    with two(context, initializer=tasks.fail_to_initialize) as pool:
        first = pool.submit(tasks.square, 1)
        with pytest.raises(WorkerStartError, match="no such database"):
            first.result(20)
        with pytest.raises(WorkerStartError, match="no such database"):
            pool.submit(tasks.square, 1)
        assert "broken" in repr(pool)


def test_bad_arguments_are_refused(context: Any) -> None:
    for options in ({"max_workers": 0}, {"max_tasks_per_child": -1}, {"grace": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            WorkerPool(**options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="initializer"):
        WorkerPool(initializer=3)  # type: ignore[arg-type]
    with two(context) as pool:
        with pytest.raises(TypeError, match="callable"):
            pool.submit(3)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="chunksize"):
            pool.map(tasks.square, [], chunksize=0)
        with pytest.raises(ValueError, match="timeout"):
            pool.options(timeout=0)
        with pytest.raises(ValueError, match="retries"):
            pool.options(retries=-1)
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(tasks.square, 1)


# Stopping


def test_a_call_that_waits_is_cancelled_and_never_runs(context: Any) -> None:
    (mine, theirs), (never, given) = gates(2)
    with WorkerPool(1, context=context) as pool:
        first = pool.submit(tasks.hold, theirs)
        second = pool.submit(tasks.hold, given)
        mine.recv(20)
        assert second.cancel()
        assert second.cancel()
        assert second.cancelled()
        mine.post_message("go on")
        first.result(20)
        assert not first.cancel()
        assert pool.submit(tasks.square, 2).result(20) == 4
    del second
    assert not never.poll(0)
    mine.close()
    never.close()
    given.close()


def test_a_call_that_is_cancelled_before_its_worker_has_begun_does_not_run(context: Any) -> None:
    (gate, given), (mine, theirs) = gates(2)
    with WorkerPool(1, context=context, grace=20, initializer=tasks.wait_at, initargs=(given,)) as pool:
        assert pool.submit(tasks.hold, theirs).cancel()
        gate.post_message("begin")
        assert pool.submit(tasks.square, 2).result(20) == 4
        with pytest.raises(mpchannel.PortClosedError):
            mine.recv(20)
    gate.close()


def test_the_time_of_a_call_begins_when_its_worker_has_begun(context: Any) -> None:
    gate, given = mpchannel.MessageChannel()
    with WorkerPool(1, context=context, initializer=tasks.wait_at, initargs=(given,)) as pool, gate:
        future = pool.options(timeout=0.5).submit(tasks.square, 3)
        with pytest.raises(TimeoutError):
            future.result(0.7)  # the caller's patience, not the call's
        assert not future.done()
        gate.post_message("begin")
        assert future.result(20) == 9


def test_a_running_call_that_looks_ends_by_itself_and_keeps_its_worker(context: Any) -> None:
    mine, theirs = mpchannel.MessageChannel()
    with WorkerPool(1, context=context, grace=20) as pool, mine:
        future = pool.submit(tasks.stop_when_asked, theirs)
        pid = mine.recv(20)
        assert future.cancel()
        with pytest.raises(concurrent.futures.CancelledError):
            future.result(0)
        assert mine.recv(20) == "stopped by itself"
        assert pool.submit(tasks.own_pid).result(20) == pid


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_an_endless_loop_frees_the_caller_at_once_and_its_worker_after_the_grace(context: Any, how: str) -> None:
    mine, theirs = mpchannel.MessageChannel()
    with WorkerPool(1, context=context, grace=0.2) as pool, mine:
        future = pool.options(timeout=0.5 if how == "timeout" else None).submit(tasks.spin, theirs)
        following = pool.submit(tasks.square, 3)
        mine.recv(20)
        if how == "cancel":
            assert future.cancel()
            assert future.cancelled()
        else:
            with pytest.raises(TimeoutError, match=r"the call of spin did not end in 0\.5 s"):
                future.result(20)
        assert following.result(20) == 9  # by a new worker
        assert mine.wait_closed(20).reason == "died"


def test_cancelling_an_await_stops_the_call(context: Any) -> None:
    async def main(pool: WorkerPool) -> Any:
        mine, theirs = mpchannel.MessageChannel()
        waiting = asyncio.ensure_future(pool.submit(tasks.stop_when_asked, theirs))  # type: ignore[arg-type]
        with mine:
            await asyncio.sleep(0)  # a task that has not begun has nothing to cancel
            await mine.arecv()
            waiting.cancel()
            return await mine.arecv()

    with two(context, grace=20) as pool:
        assert asyncio.run(main(pool)) == "stopped by itself"


def test_cancelled_and_report_are_nothing_outside_of_tasks() -> None:
    assert mpchannel.cancelled() is False
    mpchannel.report(1, 2)


# Death


def test_a_worker_that_dies_fails_its_call_only(context: Any) -> None:
    mine, theirs = mpchannel.MessageChannel()
    with two(context) as pool:
        other = pool.submit(tasks.hold, theirs, "unharmed")
        mine.recv(20)
        with pytest.raises(WorkerDied, match=r"died, killed by SIGKILL, during the call of die; .*memory") as caught:
            pool.submit(tasks.die, signal.SIGKILL).result(20)
        assert caught.value.exitcode == -signal.SIGKILL
        assert str(caught.value.pid) in str(caught.value)
        assert [pool.submit(tasks.square, number).result(20) for number in range(5)] == [0, 1, 4, 9, 16]
        mine.post_message("go on")
        assert other.result(20) == "unharmed"
    mine.close()


def test_calls_that_wait_survive_the_death_of_all_workers(context: Any) -> None:
    with two(context) as pool:
        dying = [pool.submit(tasks.die, signal.SIGKILL) for _ in range(4)]
        good = [pool.submit(tasks.square, number) for number in range(10)]
        assert [type(each.exception(20)) for each in dying] == [WorkerDied] * 4
        assert [each.result(20) for each in good] == [number**2 for number in range(10)]


def test_a_worker_that_died_while_it_was_idle_costs_no_call(context: Any) -> None:
    with WorkerPool(1, context=context) as pool:
        for number in range(5):
            pid = pool.submit(tasks.own_pid).result(20)
            ended = os.pidfd_open(pid)
            os.kill(pid, signal.SIGKILL)
            assert multiprocessing.connection.wait([ended], 20)
            os.close(ended)
            assert pool.submit(tasks.square, number).result(20) == number**2


def test_retries_run_a_call_again(context: Any, tmp_path: Path) -> None:
    with two(context) as pool:
        path = str(tmp_path / "died")
        assert pool.options(retries=1).submit(tasks.die_once, path).result(20) == "the second time"
        with pytest.raises(WorkerDied):
            pool.options(retries=2).submit(tasks.die, signal.SIGKILL).result(20)


def test_a_call_with_ports_is_lost_with_its_worker_and_so_is_a_stream(context: Any) -> None:
    with WorkerPool(1, context=context) as pool:
        mine, theirs = mpchannel.MessageChannel()
        with mine:
            call = pool.options(retries=5).submit(tasks.hold, theirs)
            os.kill(mine.recv(20), signal.SIGKILL)
            with pytest.raises(WorkerDied, match="killed by SIGKILL, during the call of hold"):
                call.result(20)
        with pytest.raises(WorkerDied, match="during the call of count_and_die"):
            list(pool.options(retries=5).stream(tasks.count_and_die, 3))


# Short calls, which are given ahead


def test_calls_are_given_ahead_while_they_are_short(context: Any) -> None:
    with WorkerPool(1, context=context) as pool:
        assert pool.submit(tasks.misbehave, "slow", 1).result(20) == 1
        (seat,) = pool._seats
        deadline = time.monotonic() + 60
        while seat.depth < 5:
            assert time.monotonic() < deadline
            for future in [pool.submit(tasks.square, 1) for _ in range(50)]:
                future.result(20)
        pool.submit(tasks.misbehave, "slow", 1).result(20)
        assert seat.depth == 1


@contextmanager
def a_long_call_and_short_ones(
    context: Any, folder: Path, workers: int = 1, **options: Any
) -> Iterator[tuple[WorkerPool, Any, Any, list[Any]]]:
    """A pool, a worker that has begun a long call, that call, and short ones, which were given to workers behind it."""
    with pytest.MonkeyPatch.context() as patch, WorkerPool(workers, context=context, **options) as pool:
        patch.setattr(workerpool._Seat, "depth", 8)
        for future in [pool.submit(tasks.square, 1) for _ in range(workers)]:
            future.result(20)
        gate = str(folder / "gate")
        os.mkfifo(gate)
        with pool._lock:  # nothing is heard, nor given but to who is idle
            busy = [pool.submit(tasks.square, 1) for _ in range(workers)]
            call = pool.submit(tasks.wait_at_gate, gate)
            short = [pool.submit(tasks.note, str(folder / "notes"), number) for number in range(20)]
        with open(gate, "w"):  # waits until it has begun
            assert all(future.result(20) == 1 for future in busy)
            seat = call._seat
            assert workers > 1 or len(seat.calls) > 1
            yield pool, seat, call, short
    assert seat.worker.exitcode is not None


def notes(folder: Path) -> list[int]:
    return sorted(map(int, (folder / "notes").read_text().split()))


def test_short_calls_do_not_wait_behind_a_long_one(context: Any, tmp_path: Path) -> None:
    with a_long_call_and_short_ones(context, tmp_path, workers=2) as (_, _, call, short):
        assert [future.result(20) for future in short] == list(range(20))
        assert call.running()
        assert notes(tmp_path) == list(range(20))


def test_calls_that_were_given_ahead_survive_their_worker_and_run_once(context: Any, tmp_path: Path) -> None:
    with a_long_call_and_short_ones(context, tmp_path) as (_, seat, call, short):
        assert not any(future.running() for future in short)
        os.kill(seat.worker.pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="during the call of wait_at_gate"):
            call.result(20)
        assert [future.result(20) for future in short] == list(range(20))
        assert notes(tmp_path) == list(range(20))


@pytest.mark.parametrize("grace", [0, 0.05])
def test_replacing_a_worker_hits_no_call_that_was_given_ahead(context: Any, tmp_path: Path, grace: float) -> None:
    with a_long_call_and_short_ones(context, tmp_path, grace=grace) as (_, seat, call, short):
        assert call.cancel()
        assert [future.result(20) for future in short] == list(range(20))
        assert notes(tmp_path) == list(range(20))
        seat.worker.join(20)
        assert seat.worker.exitcode == -signal.SIGKILL


def test_a_grace_that_ends_while_the_answer_is_on_the_way_hits_nothing(context: Any, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    os.mkfifo(gate)
    with pytest.MonkeyPatch.context() as patch, WorkerPool(1, context=context) as pool:
        patch.setattr(workerpool._Seat, "depth", 8)
        pool.submit(tasks.square, 1).result(20)
        (seat,) = pool._seats
        with pool._lock:  # no answer is heard meanwhile
            first, second = pool.submit(tasks.square, 2), pool.submit(tasks.wait_at_gate, gate)
            pool._next(seat)
            with open(gate, "w"):  # waits until the second has begun
                assert list(seat.calls.values()) == [first, second]
                workerpool._replace(weakref.ref(seat), first._number)
        assert (first.result(20), second.result(20)) == (4, "through")


def test_a_call_that_was_given_ahead_is_cancelled_and_never_runs(context: Any, tmp_path: Path) -> None:
    with a_long_call_and_short_ones(context, tmp_path, grace=0) as (_, seat, call, short):
        assert short[0].cancel()
        assert short[3].cancel()
    assert call.result(20) == "through"
    rest = [1, 2, *range(4, 20)]
    assert [short[number].result(20) for number in rest] == rest
    assert notes(tmp_path) == rest
    assert seat.worker.exitcode == 0  # it was not replaced


def test_each_claim_goes_to_one_side(context: Any) -> None:
    mine, theirs = mpchannel.MessageChannel()
    claims, count = Claims(), 5_000
    with mine, mpchannel.Worker(tasks.claim_all, claims, count, theirs, context=context):
        back: set[int] = set()
        for number in range(1, count + 1, 100):
            claims.give(range(number, number + 100))
            mine.post_message(number + 99)
            if number % 300 == 1:
                back |= claims.take_back()
        begun = mine.recv(20)
        back |= claims.take_back()
    claims.close()
    assert not back.intersection(begun)
    assert back.union(begun) == set(range(1, count + 1))
    assert back
    assert begun


# What is lost, and what is not, when things go wrong


def test_an_argument_that_ends_the_worker_where_it_is_loaded_fails_its_call(context: Any) -> None:
    with WorkerPool(1, context=context) as pool:
        call = pool.submit(len, tasks.WhenLoaded("die"))  # type: ignore[arg-type]
        following = pool.submit(tasks.square, 3)
        with pytest.raises(WorkerDied, match="exit code 9, during the call of len"):
            call.result(20)
        assert following.result(20) == 9


def test_an_argument_whose_loading_does_not_end_is_stopped(context: Any) -> None:
    with WorkerPool(1, context=context, grace=0.05) as pool:
        pool.submit(tasks.square, 1).result(20)
        call = pool.options(timeout=0.2).submit(id, tasks.WhenLoaded("spin"))
        following = pool.submit(tasks.square, 3)
        with pytest.raises(TimeoutError, match="the call of id"):
            call.result(20)
        assert following.result(20) == 9


@pytest.mark.parametrize(("number", "workers"), [(7, 1), (-9, 3)])
def test_workers_that_end_before_they_are_ready_are_not_tried_for_ever(context: Any, number: int, workers: int) -> None:
    initializer = os._exit if number > 0 else tasks.die
    with WorkerPool(1, context=context, initializer=initializer, initargs=(abs(number),)) as pool:
        call = pool.submit(tasks.square, 3)
        how = "exit code 7" if number > 0 else "killed by SIGKILL"
        with pytest.raises(WorkerStartError, match=f"Pool-{workers} .*ended, {how}, before it was ready"):
            call.result(20)


def test_a_broken_pool_settles_calls_that_come_back(context: Any, tmp_path: Path) -> None:
    with WorkerPool(2, context=context, initializer=tasks.fail_in_the_second, initargs=(str(tmp_path / "x"),)) as pool:
        gate = str(tmp_path / "gate")
        os.mkfifo(gate)
        call = pool.options(retries=1).submit(tasks.wait_at_gate, gate)
        with open(gate, "w"):  # waits until it has begun
            second = pool.submit(tasks.square, 3)
            with pytest.raises(WorkerStartError, match="no second one"):
                second.result(20)
            os.kill(call._seat.worker.pid, signal.SIGKILL)  # type: ignore[union-attr]
            with pytest.raises(WorkerStartError, match="no second one"):
                call.result(20)


def test_shutdown_ends_although_calls_are_cancelled_meanwhile(context: Any) -> None:
    mine, theirs = mpchannel.MessageChannel()
    pool = WorkerPool(1, context=context)
    call = pool.submit(tasks.hold, theirs)
    mine.recv(20)
    waiting = [pool.submit(tasks.square, number) for number in range(3)]
    cancelling = threading.Event()

    def slow(_: Any) -> None:
        cancelling.set()
        mine.post_message("go on")
        call.result(20)

    waiting[0].add_done_callback(slow)  # the call ends while those that wait are being cancelled
    pool.shutdown(cancel_futures=True)
    assert cancelling.is_set()
    assert waiting[0].cancelled()
    assert all(future.done() for future in waiting)
    mine.close()


def test_what_would_wait_for_itself_is_refused(context: Any) -> None:
    mine, theirs = mpchannel.MessageChannel()
    with WorkerPool(2, context=context) as pool, mine:
        held = pool.submit(tasks.hold, theirs)
        mine.recv(20)
        heard: list[BaseException] = []
        done = threading.Event()

        def wait(_: Any) -> None:
            for use in (held.result, held.exception, pool.shutdown):
                try:
                    use()
                except RuntimeError as error:
                    heard.append(error)
            done.set()

        gates_, theirs2 = mpchannel.MessageChannel()
        other = pool.submit(tasks.hold, theirs2)
        other.add_done_callback(wait)
        gates_.recv(20)
        gates_.post_message("go on")
        assert done.wait(20)
        assert len(heard) == 3
        assert all("would wait for itself" in str(error) for error in heard)
        mine.post_message("go on")
        held.result(20)
        gates_.close()


def test_exceptions_of_signal_handlers_cost_no_call_but_the_one_that_is_submitted(context: Any) -> None:
    class Tick(BaseException):
        pass

    armed = False

    def tick(*_: Any) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise Tick

    before = signal.signal(signal.SIGALRM, tick)
    dice = random.Random(0)
    hits = 0
    try:
        with WorkerPool(1, context=context) as pool:
            pool.submit(tasks.square, 1).result(20)
            kept = []
            for number in range(1500):
                try:
                    armed = True
                    signal.setitimer(signal.ITIMER_REAL, dice.uniform(5e-6, 120e-6))
                    kept.append((number, pool.submit(tasks.square, number)))
                    armed = False
                except Tick:
                    hits += 1
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                if number % 5 == 0:
                    assert pool.submit(tasks.square, 5).result(20) == 25
            assert all(future.result(20) == number * number for number, future in kept)
            assert hits
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_call_that_was_never_posted_is_given_up_even_if_its_token_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tick(BaseException):
        pass

    with WorkerPool(1, context="fork") as pool:
        assert pool.submit(tasks.square, 1).result(20) == 1
        pack, packed = _clone.pack, []

        def interrupted(*given: Any) -> Any:
            packed.append(pack(*given))
            if len(packed) == 2:  # the first is the call's own
                # The worker takes it, when what it is at was taken back from it.
                assert pool._seats[0].claims.take_back() == {2}
                raise Tick
            return packed[-1]

        monkeypatch.setattr(_clone, "pack", interrupted)
        with pytest.raises(Tick):
            pool.submit(tasks.square, 2)
        monkeypatch.setattr(_clone, "pack", pack)
        assert not pool._seats[0].calls
        assert pool.submit(tasks.square, 3).result(20) == 9


def test_a_stream_goes_on_behind_values_that_cannot_be_loaded(context: Any) -> None:
    with WorkerPool(1, context=context) as pool:
        values, bad = [], 0
        stream = pool.stream(tasks.echo_unloadable, 400)
        while True:
            try:
                values.append(next(stream))
            except mpchannel.MessageError:
                bad += 1
            except StopIteration:
                break
        assert (values, bad) == (list(range(0, 400, 2)), 200)
        with pytest.raises(PortClosedError, match="of the generator"):
            list(pool.stream(tasks.raise_port_closed, 3))


# Streams


def test_a_stream_gives_all_values_in_order(context: Any) -> None:
    with two(context) as pool:
        assert list(pool.stream(tasks.count_up, 500)) == list(range(500))

        async def main() -> list[int]:
            return [value async for value in pool.stream(tasks.count_up, 500)]

        assert asyncio.run(main()) == list(range(500))
        for function, error in ((tasks.count_and_fail, LookupError), (tasks.count_and_die, WorkerDied)):
            stream = pool.stream(function, 3)
            assert [next(stream) for _ in range(3)] == [0, 1, 2]
            with pytest.raises(error):
                next(stream)
            assert list(stream) == []


def test_closing_a_stream_runs_its_finally_and_frees_the_worker(context: Any) -> None:
    mine, theirs = mpchannel.MessageChannel()
    with WorkerPool(1, context=context, grace=20) as pool, mine:
        pid = pool.submit(tasks.own_pid).result(20)
        with pool.stream(tasks.count_up, 10**9, theirs) as stream:
            assert [next(stream) for _ in range(3)] == [0, 1, 2]
        assert mine.recv(20) == "finally"
        assert list(stream) == []
        assert pool.submit(tasks.own_pid).result(20) == pid


# Progress


def test_progress_reaches_the_caller_in_order(context: Any) -> None:
    told: list[Any] = []
    with two(context) as pool:
        assert pool.options(on_progress=lambda *all_: told.append(all_)).submit(tasks.tell_progress, 3).result(20) == (
            "done"
        )
    assert told == [(number, 3, f"step {number}") for number in range(3)]


# The end


def test_shutdown_waits_for_what_was_submitted_or_cancels_it(context: Any) -> None:
    pool = WorkerPool(1, context=context)
    futures = [pool.submit(time.sleep, 0.01) for _ in range(10)]
    pool.shutdown()
    assert all(each.done() and not each.cancelled() for each in futures)

    mine, theirs = mpchannel.MessageChannel()
    pool = WorkerPool(1, context=context)
    running = pool.submit(tasks.hold, theirs, "to its end")
    waiting = pool.submit(tasks.square, 1)
    mine.recv(20)
    pool.shutdown(wait=False, cancel_futures=True)
    assert waiting.cancelled()
    mine.post_message("go on")
    assert running.result(20) == "to its end"
    pool.shutdown()
    mine.close()


def test_a_pool_that_nobody_refers_to_lets_its_workers_go(context: Any) -> None:
    pool = WorkerPool(1, context=context)
    seat = pool.submit(tasks.own_pid)
    seat.result(20)
    worker = pool._seats[0].worker
    del pool
    gc.collect()
    worker.join(20)
    assert worker.exitcode == 0


def test_a_storm_of_cancels_timeouts_kills_and_exceptions_settles_every_call(context: Any) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    kinds = ["fine"] * 80 + ["slow"] * 5 + ["raise"] * 12 + ["die"] + ["exit"] + ["spin"]
    outcomes = {
        "raise": LookupError,
        "die": WorkerDied,
        "exit": WorkerDied,
        "spin": (TimeoutError, concurrent.futures.CancelledError),
    }
    count = {"fork": 10_000, "forkserver": 3000, "spawn": 1000}[context.get_start_method()]
    with WorkerPool(2, context=context, grace=0.01) as pool:
        calls = []
        for number in range(count):
            kind = dice.choice(kinds)
            future = pool.options(timeout=0.05 if kind == "spin" else None).submit(tasks.misbehave, kind, number)
            cancel = dice.random() < 0.05 and future.cancel()
            calls.append((kind, number, cancel, future))
            if number % 50 == 0:
                future.exception(60) if not cancel else None
        for kind, number, cancel, future in calls:
            if cancel:
                assert future.cancelled()
            elif kind in outcomes:
                with pytest.raises(outcomes[kind]):  # type: ignore[arg-type]
                    future.result(60)
            else:
                assert future.result(60) == number
