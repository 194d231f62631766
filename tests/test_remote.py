"""``expose``, ``wrap``, ``awrap``, ``release``: objects that live behind a port."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest

import mpchannel
from mpchannel import DataCloneError, MessageError, PortClosedError, Worker

from . import remote_objects as objects


@contextmanager
def served(context: Any, target: Any = objects.serve, *args: Any) -> Iterator[tuple[Worker, Any]]:
    with Worker(target, *args, context=context) as worker, mpchannel.wrap(worker) as proxy:
        yield worker, proxy


@pytest.fixture
def here() -> Iterator[tuple[objects.Store, Any]]:
    """An object and its proxy in this process; it is called on the delivery thread."""
    store = objects.Store()
    near, far = mpchannel.MessageChannel()
    mpchannel.expose(store, near)
    with mpchannel.wrap(far) as proxy:
        yield store, proxy
    near.wait_closed(20)


# Calls and attributes


def test_methods_and_attributes_are_those_of_the_object(context: Any) -> None:
    with served(context) as (worker, store):
        assert store.put("a", 1) == 1
        assert store.put(key="b", value=[2]) == 2
        assert (store.get("a"), store.get("b"), store.get("c", default=3)) == (1, [2], 3)
        assert store.own_pid() == worker.pid
        assert store.count == 2
        store.count = 40
        assert store.put("c", 3) == 41
        put = store.put  # a method is got once, and kept
        assert put("d", 4) == 42
        assert {"put", "count"} <= set(dir(store))
        assert "_secret" not in dir(store)
        assert "put" in repr(put)
        assert str(worker.pid) in repr(store)


def test_what_is_missing_or_hidden_fails_at_once(here: Any) -> None:
    _, store = here
    with pytest.raises(AttributeError, match="'Store' object has no attribute 'nothing'"):
        store.nothing  # noqa: B018
    with pytest.raises(AttributeError, match="names with an underscore are local"):
        store._secret  # noqa: B018
    assert not hasattr(store, "nothing")
    with pytest.raises(AttributeError, match="begins with an underscore"):
        store._caller.call("call", "_private")
    with pytest.raises(TypeError, match="not callable"):
        store()
    assert store.put("a", 1) == 1


def test_a_function_is_an_object_too(context: Any) -> None:
    ours, theirs = mpchannel.MessageChannel()
    mpchannel.expose(max, ours)
    with mpchannel.wrap(theirs) as largest:
        assert largest(3, 5, key=None) == 5


def test_exceptions_come_home_with_traceback_notes_and_groups(context: Any) -> None:
    with served(context) as (_, store):
        with pytest.raises(ExceptionGroup, match="several") as caught:
            store.fail()
        assert caught.value.exceptions[0].__notes__ == ["a note"]
        assert isinstance(caught.value.__cause__, mpchannel.RemoteError)
        assert "in fail" in str(caught.value.__cause__)
        assert store.put("a", 1) == 1


def test_ports_and_arrays_are_arguments_and_results(context: Any) -> None:
    with served(context) as (_, store):
        array = np.arange(300_000)
        assert np.array_equal(store.same(array), array)
        near, far = mpchannel.MessageChannel()
        store.through_port(far, "hello")
        assert far.detached
        assert near.recv(20) == "hello"
        near, far = mpchannel.MessageChannel()
        back = store.same(far)
        back.post_message("there and back")
        assert near.recv(20) == "there and back"
        near.close()
        back.close()


def test_what_cannot_be_sent_or_loaded_fails_that_call_only(context: Any) -> None:
    with served(context) as (_, store):
        near, far = mpchannel.MessageChannel()
        with near, far:
            with pytest.raises(DataCloneError, match="lock"):
                store.same([far, threading.Lock()])
            assert not far.detached
        with pytest.raises(DataCloneError, match="a closed port"):
            store.same(far)
        with pytest.raises(LookupError, match="it cannot be loaded here"):
            store.same(objects.NotLoadable())
        with pytest.raises(DataCloneError, match="lock"):
            store.unsendable()
        with pytest.raises(MessageError) as caught:
            store.not_loadable()
        assert isinstance(caught.value.__cause__, LookupError)
        assert store.put("a", 1) == 1
        assert len(store._caller._free) == 1  # one lane served them all


def test_each_thread_gets_its_own_answers(context: Any) -> None:
    with served(context) as (_, store):
        wrong: list[Any] = []

        def use(me: int) -> None:
            wrong.extend((me, number) for number in range(100) if store.same((me, number)) != (me, number))

        threads = [threading.Thread(target=use, args=(me,)) for me in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len(store._caller._free) <= 8


def test_a_call_that_is_interrupted_costs_only_itself(context: Any) -> None:
    with served(context) as (_, store):
        near, far = mpchannel.MessageChannel()
        near.once("message", lambda _: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
        near.start()
        with pytest.raises(KeyboardInterrupt):
            store.hold(far)
        near.post_message("go on")
        assert store.put("a", 1) == 1
        near.close()


# Generators


def test_generators_stream(context: Any) -> None:
    with served(context) as (_, store):
        assert list(store.each(1000)) == list(range(1000))
        assert list(store.each(0)) == []
        values = store.each_and_fail(3)
        assert [next(values), next(values), next(values)] == [0, 1, 2]
        with pytest.raises(LookupError, match="behind the last"):
            next(values)
        assert list(values) == []
        one, other = store.each(5), store.each(5)
        assert list(zip(one, other, strict=True)) == [(number, number) for number in range(5)]


def test_a_stream_is_at_most_so_far_ahead_and_closing_it_runs_its_finally(here: Any) -> None:
    store, proxy = here
    values = proxy.each(1_000_000)
    assert next(values) == 0
    while store.count < 63:
        proxy.own_pid()
    for _ in range(10):
        proxy.own_pid()  # each is a turn that the generator could have had too
    assert store.count == 63
    assert [next(values) for _ in range(200)] == list(range(1, 201))
    assert store.count <= 201 + 64
    values.close()
    assert list(values) == []
    while "finally" not in store.items:
        proxy.own_pid()
    assert "over" in repr(values)


def test_a_stream_ends_with_the_other_side(context: Any) -> None:
    with served(context) as (worker, store):
        values = store.each(1_000_000)
        assert next(values) == 0
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(PortClosedError) as caught:
            for _ in values:
                pass
        assert caught.value.reason == "died"


# Functions among the arguments


def test_a_function_is_called_by_the_thread_that_waits(context: Any) -> None:
    with served(context) as (_, store):
        calls: list[Any] = []

        def progress(done: int, total: int) -> int:
            calls.append((done, total, threading.current_thread() is threading.main_thread(), os.getpid()))
            return done * 10

        assert store.work(3, progress) == [0, 10, 20]
        assert calls == [(number, 3, True, os.getpid()) for number in range(3)]
        assert store.work(count=2, progress=lambda done, total: done) == [0, 1]


def test_what_a_function_raises_goes_through_the_method_and_home(context: Any) -> None:
    class Stop(Exception):
        pass

    def progress(done: int, total: int) -> None:
        if done == 1:
            raise Stop("enough")

    with served(context) as (_, store):
        with pytest.raises(Exception, match="enough") as caught:
            store.work(3, progress)
        assert type(caught.value).__name__ == "Stop"
        assert "in work" in str(caught.value.__cause__)


def test_a_function_is_called_after_its_call_and_let_go_with_its_last_holder(context: Any) -> None:
    with served(context) as (_, store):
        heard: list[Any] = []

        class Listener:
            def __call__(self, value: Any) -> int:
                raise NotImplementedError

            def hear(self, value: Any) -> int:
                heard.append(value)
                return len(heard)

        for let_go in (store.release_kept, store.drop_kept):
            listener = Listener()
            gone = weakref.ref(listener)
            store.keep(listener.hear)
            del listener
            assert store.call_kept("a") == len(heard)
            assert store.call_kept("b") == len(heard)
            let_go()
            deadline = time.monotonic() + 20
            while gone() is not None and time.monotonic() < deadline:
                gc.collect()
            assert gone() is None
        assert heard == ["a", "b"] * 2


def test_proxies_are_passed_on_through_several_processes(context: Any) -> None:
    near, far = mpchannel.MessageChannel()
    with Worker(objects.serve_port, near, context=context), served(context, objects.chain, far) as (_, middle):
        calls: list[int] = []
        assert middle.work(3, lambda done, total: calls.append(done) or total) == [3, 3, 3]
        assert calls == [0, 1, 2]


# Ends


@pytest.mark.parametrize("how", ["kill", "exit", "close", "release"])
def test_pending_calls_fail_with_the_reason(context: Any, how: str) -> None:
    control, theirs = mpchannel.MessageChannel()
    target = (objects.serve_and_close_when_told, theirs) if how == "close" else (objects.serve,)
    with served(context, *target) as (worker, store), control:
        near, far = mpchannel.MessageChannel()
        store.own_pid()  # two lanes, one of them old
        errors: list[PortClosedError] = []

        def call() -> None:
            try:
                store.hold(far)
            except PortClosedError as error:
                errors.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        assert near.recv(20) == "begun"
        if how == "kill":
            os.kill(worker.pid, signal.SIGKILL)
        elif how == "exit":
            worker.terminate()
        elif how == "close":
            control.post_message("close")
        else:
            mpchannel.release(store)
        thread.join(20)
        assert [error.reason for error in errors] == [
            {"kill": "died", "exit": "died", "close": "closed", "release": None}[how]
        ]
        with pytest.raises(PortClosedError, match=r"the call of put\(\) will not be answered|this call") as caught:
            store.put("a", 1)
        assert caught.value.reason == errors[0].reason
        near.close()
        control.close()


def test_a_worker_that_cannot_start_says_why(context: Any) -> None:
    with (
        Worker("no_such_module:serve", context=context) as worker,
        mpchannel.wrap(worker) as store,
        pytest.raises(PortClosedError) as caught,
    ):
        store.put("a", 1)
    assert isinstance(caught.value.__cause__, mpchannel.WorkerStartError)


def test_dropping_the_proxy_lets_go_of_the_object() -> None:
    store = objects.Store()
    gone = weakref.ref(store)
    near, far = mpchannel.MessageChannel()
    mpchannel.expose(store, near)
    proxy = mpchannel.wrap(far)
    assert proxy.put("a", 1) == 1
    del store, far
    assert gone() is not None
    del proxy
    assert near.wait_closed(20).reason == "collected"
    deadline = time.monotonic() + 20
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
    assert gone() is None


def test_closing_the_port_lets_go_of_the_object() -> None:
    store = objects.Store()
    gone = weakref.ref(store)
    near, far = mpchannel.MessageChannel()
    mpchannel.expose(store, near)
    del store
    with mpchannel.wrap(far) as proxy:
        assert proxy.put("a", 1) == 1
        near.close()
        gc.collect()
        assert gone() is None
        with pytest.raises(PortClosedError):
            proxy.put("b", 2)


def test_a_proxy_that_is_given_to_a_process_moves_there(context: Any) -> None:
    store = objects.Store()
    ours, theirs = mpchannel.MessageChannel()
    mpchannel.expose(store, ours)
    proxy = mpchannel.wrap(theirs)
    assert proxy.own_pid() == os.getpid()
    near, far = mpchannel.MessageChannel()
    process = context.Process(target=objects.use, args=(proxy, far))
    process.start()
    assert near.recv(20) == os.getpid()
    process.join()
    with pytest.raises(mpchannel.PortDetachedError, match="given to"):
        proxy.own_pid()
    near.close()
    ours.wait_closed(20)


# Bad use


def test_bad_use_is_refused(here: Any) -> None:
    _, proxy = here
    near, far = mpchannel.MessageChannel()
    with near, far:
        for use in (mpchannel.wrap, mpchannel.awrap, partial(mpchannel.expose, 1)):
            with pytest.raises(TypeError, match=r"takes a MessagePort or a Worker, not 'x'"):
                use("x")
        mpchannel.expose(1, near)
        wrapped = mpchannel.wrap(far)
        for use in (mpchannel.wrap, partial(mpchannel.expose, 2)):
            for port in (near, far):
                with pytest.raises(ValueError, match="is in use"):
                    use(port)
        assert wrapped.real == 1
        with pytest.raises(TypeError, match="release takes what wrap or awrap returned"):
            mpchannel.release(near)
        with pytest.raises(TypeError, match="moves, it is never copied"):
            pickle.dumps(proxy)
    moved, other = mpchannel.MessageChannel()
    with other, mpchannel.MessageChannel() as channel:
        channel.port1.post_message(None, [moved])
        with pytest.raises(mpchannel.PortDetachedError):
            mpchannel.wrap(moved)


def test_an_object_of_this_very_thread_is_called_while_it_waits() -> None:
    async def main() -> None:
        near, far = mpchannel.MessageChannel()
        with near, mpchannel.wrap(far) as proxy:
            mpchannel.expose(objects.AsyncStore(), near)
            assert proxy.put("a", 1) == 1
            with pytest.raises(TypeError, match="needs an asyncio loop"):
                proxy.later(1)  # the loop stands still meanwhile

    asyncio.run(main())


def test_circles_of_calls_do_not_wait_for_themselves(context: Any) -> None:
    with served(context) as (_, store):
        calls: list[Any] = []
        # A function that uses the proxy it was given to; and one that was kept, called while a listener waits.
        assert store.work(2, lambda done, total: store.put("n", done) or total) == [1, 2]
        store.keep(lambda value: calls.append(value) or len(calls))
        near, far = mpchannel.MessageChannel()
        done = threading.Event()
        near.on("message", lambda event: (calls.append(store.call_kept(event.data)), done.set()))
        near.start()
        far.post_message("x")
        assert done.wait(20)
        assert calls == ["x", 1]
        near.close()
        far.close()


def test_a_function_whose_arguments_cannot_be_loaded_fails_there(context: Any) -> None:
    with served(context) as (_, store):
        for _ in range(3):
            with pytest.raises(LookupError, match="it cannot be loaded here"):
                store.call_with_unloadable(lambda value: value)
            assert store.own_pid() != os.getpid()


# asyncio


def test_calls_are_awaited_and_begin_in_order(context: Any) -> None:
    async def main() -> None:
        with Worker(objects.serve_on_loop, context=context) as worker:
            async with mpchannel.awrap(worker) as store:
                assert await store.put("a", 1) == 1
                assert await store.later(2) == 2
                assert await store.count == 1
                assert await asyncio.gather(*(store.later(number) for number in range(50))) == list(range(50))
                await asyncio.gather(*(store.append(number) for number in range(50)))
                assert await store.get("order") == list(range(50))
                append = await store.append
                await append(50)
                with pytest.raises(AttributeError, match="no attribute 'nothing'"):
                    await store.nothing()
                with pytest.raises(ExceptionGroup):
                    await store.fail()
                with pytest.raises(AttributeError, match="cannot be awaited"):
                    store.count = 5
                assert [value async for value in await store.each(200)] == list(range(200))
                assert [value async for value in await store.aeach(200)] == list(range(200))
                os.kill(worker.pid, signal.SIGKILL)
                with pytest.raises(PortClosedError) as caught:
                    await store.put("b", 2)
                assert caught.value.reason == "died"

    asyncio.run(main())


def test_cancelling_an_await_cancels_the_coroutine_there(context: Any) -> None:
    async def main() -> None:
        near, far = mpchannel.MessageChannel()
        with near, Worker(objects.serve_on_loop, context=context) as worker, mpchannel.awrap(worker) as store:
            waiting = asyncio.ensure_future(store.wait_for(far))
            assert await near.arecv() == "begun"
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert await near.arecv() == "cancelled"
            assert await store.put("a", 1) == 1

    asyncio.run(main())


def test_closing_an_async_stream_runs_its_finally_at_once(context: Any) -> None:
    async def main() -> None:
        near, far = mpchannel.MessageChannel()
        with near, Worker(objects.serve_on_loop, context=context) as worker, mpchannel.awrap(worker) as store:
            async with await store.aeach(3, far) as values:
                assert [await anext(values) for _ in range(3)] == [0, 1, 2]
            assert await near.arecv() == "finally"  # though the generator waits for something else
            near2, far2 = mpchannel.MessageChannel()
            async with await store.aeach(1_000_000, far2) as values:
                assert [await anext(values) for _ in range(300)] == list(range(300))
                assert await store.count <= 300 + 64
            assert await near2.arecv() == "finally"
            near2.close()

    asyncio.run(main())


def test_functions_are_called_on_the_loop(context: Any) -> None:
    async def main() -> None:
        with Worker(objects.serve_on_loop, context=context) as worker, mpchannel.awrap(worker) as store:
            loop = asyncio.get_running_loop()

            async def progress(done: int) -> bool:
                await asyncio.sleep(0)
                return asyncio.get_running_loop() is loop

            assert await store.awork(3, progress) == [True] * 3
            assert await store.awork(2, lambda done: done) == [0, 1]

    asyncio.run(main())


def test_coroutines_need_a_loop_there(here: Any) -> None:
    store = objects.AsyncStore()
    near, far = mpchannel.MessageChannel()
    mpchannel.expose(store, near)
    with mpchannel.wrap(far) as proxy:
        with pytest.raises(TypeError, match="needs an asyncio loop"):
            proxy.later(1)
        with pytest.raises(TypeError, match="needs an asyncio loop"):
            proxy.aeach(1)
        assert proxy.put("a", 1) == 1
    near.wait_closed(20)


def test_many_calls_and_functions_leave_nothing(context: Any) -> None:
    with served(context) as (_, store):
        store.work(1, lambda *_: None)
        before = len(os.listdir("/proc/self/fd"))
        for number in range(300):
            assert store.work(1, lambda *_, number=number: number) == [number]
            assert next(store.each(100)) == 0  # a stream that is dropped half way
        gc.collect()
        deadline = time.monotonic() + 20
        while len(os.listdir("/proc/self/fd")) > before + 4 and time.monotonic() < deadline:
            gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= before + 4
