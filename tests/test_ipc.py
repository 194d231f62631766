"""Named channels between a parent and its children, and the window."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

import mpchannel
from mpchannel import Worker, ipc, window

from . import ipc_children
from .test_worker import ending


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """``ipc.main`` and the window belong to the process: the next test finds them empty."""
    yield
    ipc.main.__init__()  # type: ignore[misc]
    window.onmessage = None
    window.__init__()  # type: ignore[misc]


class Heard:
    """Events as they came, and a wait for the one on channel "last"."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.last = threading.Event()

    def __call__(self, event: Any) -> None:
        self.events.append(event)
        if event.channel == "last":
            self.last.set()

    def wait(self) -> list[Any]:
        assert self.last.wait(20)
        return self.events


def calls(worker_target: Any, port_and: tuple[Any, ...], context: Any) -> tuple[Worker, Any]:
    mine, theirs = mpchannel.MessageChannel()
    return Worker(worker_target, theirs, *port_and, context=context), mine


# on, once, off, post_message, send


@pytest.mark.parametrize("early", [True, False], ids=("before the child", "late"))
@pytest.mark.row("E25")
def test_what_a_child_says_comes_in_order_with_the_very_child_as_its_sender(context: Any, early: bool) -> None:
    heard = Heard()

    def give(event: Any) -> None:
        heard(event)
        event.ports[0].post_message("through the port")
        event.ports[0].close()

    def listen(end: Any) -> None:
        for channel in ("first", "second", "nothing at all", "last"):
            end.on(channel, heard)
        end.on("port", give)

    if early:
        listen(ipc.main)
    with ending(Worker(ipc_children.say_everything, context=context)) as worker:
        if not early:
            listen(worker.ipc)
        events = heard.wait()
    assert [(event.channel, event.data, event.args, len(event.ports)) for event in events] == [
        ("first", {"n": 1}, ({"n": 1},), 0),
        ("second", 1, (1, "a", None), 0),
        ("nothing at all", None, (), 0),
        ("port", "a port", ("a port",), 1),
        ("last", None, (), 0),
    ]
    assert all(event.sender is worker for event in events)


def test_a_process_has_named_channels_if_it_was_asked_for_them(context: Any) -> None:
    heard = Heard()
    process = context.Process(target=ipc_children.say_everything)
    process.ipc.on("last", heard)
    process.ipc.on("port", lambda event: event.ports[0].post_message("through the port"))
    process.start()
    assert heard.wait()[0].sender is process
    process.join()
    assert process.exitcode == 0

    ipc.main.on("last", heard)  # now every process has
    mine, theirs = mpchannel.MessageChannel()
    process = context.Process(target=ipc_children.tell_of_channels, args=(theirs,))
    process.start()
    assert mine.recv(20) is None
    process.join()
    mine.close()


def test_a_process_that_was_not_asked_for_them_says_what_to_do(context: Any) -> None:
    mine, theirs = mpchannel.MessageChannel()
    process = context.Process(target=ipc_children.tell_of_channels, args=(theirs,))
    process.start()
    kind, text = mine.recv(20)
    assert kind is RuntimeError
    assert "before start()" in text
    with pytest.raises(RuntimeError, match="before start"):
        process.ipc  # noqa: B018
    process.join()
    mine.close()
    assert "main program" in ipc_children.has_channels()[1]  # type: ignore[index]


def test_listeners_of_the_child_come_first_and_then_those_of_main(context: Any) -> None:
    order: list[str] = []
    over = threading.Event()
    ipc.main.on("last", lambda _: (order.append("main"), over.set()))
    with ending(Worker(ipc_children.say_much, 0, context=context)) as worker:
        worker.ipc.on("last", lambda _: order.append("child"))
        # The child's own may be registered too late for it under fork: only then main's alone hear of it.
        assert over.wait(20)
    assert order in (["child", "main"], ["main"])
    with ending(Worker(ipc_children.answer_by_name, context=context)) as worker:
        order.clear()
        over.clear()
        worker.ipc.on("answer", lambda _: order.append("child"))
        ipc.main.on("answer", lambda _: (order.append("main"), over.set()))
        worker.ipc.send("ask")
        assert over.wait(20)
        worker.ipc.send("stop")
    assert order == ["child", "main"]


def test_a_child_answers_and_lives_while_it_listens(context: Any) -> None:
    answers: list[Any] = []
    over = threading.Event()

    def hear(event: Any) -> None:
        answers.append((event.data, len(event.ports)))
        if len(answers) == 2:
            over.set()

    mine, theirs = mpchannel.MessageChannel()
    with ending(Worker(ipc_children.answer_by_name, context=context)) as worker, mine:
        worker.ipc.on("answer", hear)
        worker.ipc.send("ask", 1, 2)
        worker.ipc.post_message("ask", "with a port", [theirs])
        assert over.wait(20)
        assert worker.exitcode is None
        assert ipc.main.send("stop")  # to every child
    assert answers == [((1, (1, 2), 0, True), 0), (("with a port", ("with a port",), 1, True), 1)]
    assert worker.ipc.send("ask") is False


def test_once_and_off_pause_without_loss(context: Any) -> None:
    heard: list[int] = []
    over = threading.Event()

    def again(event: Any) -> None:
        heard.append(event.data)
        if event.data < 9:
            worker.ipc.once("numbers", again)
        else:
            over.set()

    with ending(Worker(ipc_children.say_much, 10, context=context)) as worker:
        last = Heard()
        worker.ipc.on("last", last)
        last.wait()  # by then the numbers are kept
        worker.ipc.off("last", last)
        worker.ipc.once("numbers", again)
        assert over.wait(20)
    assert heard == list(range(10))


def test_what_nobody_listens_to_is_kept_up_to_a_bound_with_a_warning(context: Any) -> None:
    heard, last, all_kept = Heard(), Heard(), threading.Event()
    with warnings.catch_warnings(record=True) as caught:  # of all threads
        warnings.simplefilter("always")
        with ending(Worker(ipc_children.say_much, ipc.KEPT + 5, context=context)) as worker:
            worker.ipc.on("last", last)
            last.wait()
    worker.ipc.on("numbers", lambda event: (heard(event), event.data == ipc.KEPT - 1 and all_kept.set()))
    assert all_kept.wait(20)
    assert [event.data for event in heard.events] == list(range(ipc.KEPT))
    texts = [str(each.message) for each in caught if "nobody listens" in str(each.message)]
    assert texts == ["nobody listens to channel 'numbers': 1000 messages are kept, those that follow are dropped"]


def test_what_comes_while_the_kept_ones_are_handed_out_stays_behind_them() -> None:
    heard: list[int] = []
    over, blocked, gate = threading.Event(), threading.Event(), threading.Event()

    def hear(event: Any) -> None:
        heard.append(event.data[0])
        if len(heard) == 2:
            over.set()

    with ending(Worker(ipc_children.answer_by_name)) as worker:
        worker.ipc.on("block", lambda _: (blocked.set(), gate.wait(20)))
        worker.ipc.send("ask", 1)
        worker.ipc.send("ask", "block")
        assert blocked.wait(20)  # the delivery thread is in that listener
        worker.ipc.send("ask", 2)
        assert worker.ipc._port is not None
        assert worker.ipc._port.poll(20)
        worker.ipc.on("answer", hear)  # what came first is to be handed out, and the next is there already
        gate.set()
        assert over.wait(20)
        worker.ipc.send("stop")
    assert heard == [1, 2]


@pytest.mark.row("E50")
def test_only_post_message_moves_ports_and_what_cannot_be_sent_is_named(context: Any) -> None:
    worker, port = calls(ipc_children.refuse_ports, (), context)
    ipc.main.on("x", print)
    with ending(worker), port:
        texts = [port.recv(20) for _ in range(6)]
        assert port.recv(20) == "unharmed"
    assert [kind for kind, _ in texts] == [mpchannel.DataCloneError] * 5 + [TypeError]
    beginnings = [text for _, text in texts]
    assert beginnings[0].startswith("args[1][0]: send() moves no ports; use post_message(")
    assert beginnings[1].startswith("args[0]: invoke() moves no ports; use post_message(")
    assert beginnings[2].startswith("message['a']: ")
    assert beginnings[3].startswith("args[0]['lock']: cannot pickle")
    assert beginnings[4].startswith("message['lock']: cannot pickle")
    assert "channel must be a str" in beginnings[5]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="channel must be a str"):
        ipc.main.on(3, print)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="callable"):
        ipc.main.handle("x", 3)  # type: ignore[arg-type]
    ipc.main.handle("x", print)
    with pytest.raises(ValueError, match="handled already"):
        ipc.main.handle("x", repr)
    ipc.main.remove_handler("x")
    ipc.main.remove_handler("x")
    ipc.main.handle("x", repr)
    mine, theirs = mpchannel.MessageChannel()
    with pytest.raises(mpchannel.DataCloneError, match="one child only"):
        ipc.main.post_message("x", None, [theirs])
    assert ipc.main.send("x") is False
    assert not theirs.detached
    mine.close()
    theirs.close()


# invoke and handle


@pytest.mark.parametrize("target", [ipc_children.invoke_each, ipc_children.ainvoke_each], ids=("invoke", "ainvoke"))
def test_invoke_gives_the_result_or_raises_what_was_raised(context: Any, target: Any) -> None:
    def fail(_: Any, text: str) -> None:
        raise ipc_children.Trouble(text)

    asked: list[Any] = [("sum", (1, 2)), ("who", ()), ("fail", ("a text",)), ("no such", ()), ("lock", ()), ("sum", ())]
    ipc.main.handle("fail", fail)
    ipc.main.handle("sum", lambda _, one, other: ("main's", one + other))
    ipc.main.handle("who", lambda event: event.sender is worker)
    ipc.main.handle("lock", lambda _: threading.Lock())
    worker, port = calls(target, (asked, 20), context)
    with ending(worker), port:
        assert port.recv(20) == ("main's", 3)
        assert port.recv(20) is True
        kind, text, cause = port.recv(20)
        assert (kind, text) == (ipc_children.Trouble, "a text")
        assert "in fail" in cause
        kind, text, _ = port.recv(20)
        assert kind is LookupError
        assert text.endswith("handled: 'fail', 'lock', 'sum', 'who'")
        assert port.recv(20)[0] is mpchannel.DataCloneError
        assert port.recv(20)[0] is TypeError


def test_a_childs_own_function_is_asked_before_mains(context: Any) -> None:
    ipc.main.handle("pid", lambda _: "main's")
    process = context.Process(target=ipc_children.nothing)
    process.ipc.handle("pid", lambda _: "of another child")
    mine, theirs = mpchannel.MessageChannel()
    asking = context.Process(target=ipc_children.invoke_each, args=(theirs, [("pid", ())], 20))
    asking.ipc.handle("pid", lambda _: "the child's own")
    asking.start()
    assert mine.recv(20) == "the child's own"
    asking.join()
    mine.close()


def test_functions_may_be_coroutine_functions_on_a_loop(context: Any) -> None:
    async def answer(event: Any, number: int) -> int:
        await asyncio.sleep(0)
        if number < 0:
            raise ipc_children.Trouble(str(number))
        return number * 2

    async def main() -> list[Any]:
        ipc.main.handle("double", answer)
        worker, port = calls(ipc_children.invoke_each, ([("double", (21,)), ("double", (-1,))], 20), context)
        with ending(worker), port:
            return [await port.arecv(), await port.arecv()]

    first, (kind, text, _) = asyncio.run(main())
    assert (first, kind, text) == (42, ipc_children.Trouble, "-1")


def test_a_coroutine_function_without_a_loop_is_an_error_for_who_asks(context: Any) -> None:
    async def answer(_: Any) -> None:
        pass

    ipc.main.handle("double", answer)
    worker, port = calls(ipc_children.invoke_each, ([("double", ())], 20), context)
    with ending(worker), port:
        kind, text, _ = port.recv(20)
    assert kind is TypeError
    assert "needs an asyncio loop" in text


@pytest.mark.parametrize("target", [ipc_children.invoke_each, ipc_children.ainvoke_each], ids=("invoke", "ainvoke"))
def test_invoke_gives_up_after_its_timeout(context: Any, target: Any) -> None:
    go_on = threading.Event()
    ipc.main.handle("slow", lambda _: go_on.wait(20))
    worker, port = calls(target, ([("slow", ())], 0.2), context)
    with ending(worker), port:
        kind, text, _ = port.recv(20)
        go_on.set()
    assert (kind, text) == (TimeoutError, "invoke('slow') was not answered in 0.2 s")


def test_invoke_of_a_parent_that_listens_to_nothing_does_not_hang(context: Any) -> None:
    worker, port = calls(ipc_children.invoke_without_patience, ([("x", ())], None), context)
    with ending(worker), port:
        kind, text, _ = port.recv(20)
    assert kind is LookupError
    assert "listened to nothing" in text


def test_invoke_waits_for_a_slow_answer_of_a_parent_that_came_late(context: Any) -> None:
    asked, go_on = threading.Event(), threading.Event()
    worker, port = calls(ipc_children.invoke_without_patience, ([("slow", ())], None), context)
    with ending(worker), port:
        worker.ipc.handle("slow", lambda _: (asked.set(), go_on.wait(20))[1])
        assert asked.wait(20)
        assert not port.poll(1)  # three times its patience
        go_on.set()
        assert port.recv(20) is True


def test_invoke_waits_for_a_parent_that_is_about_to_listen(context: Any) -> None:
    for _ in range(5):
        worker, port = calls(ipc_children.invoke_each, ([("late", ())], None), context)
        with ending(worker), port:
            worker.ipc.handle("late", lambda _: "in time")
            assert port.recv(20) == "in time"


def test_invoke_fails_at_once_when_the_parent_is_gone(context: Any) -> None:
    mine, theirs = mpchannel.MessageChannel()
    middle = context.Process(target=start_and_die, args=(theirs, context.get_start_method()))
    middle.start()
    kind, text, _ = mine.recv(20)
    assert kind is mpchannel.PortClosedError
    assert text.startswith("invoke('die') will not be answered")
    middle.join()
    assert middle.exitcode == -signal.SIGKILL
    mine.close()


def start_and_die(port: Any, method: str) -> None:
    process = mpchannel.get_context(method).Process(target=ipc_children.invoke_each, args=(port, [("die", ())], None))
    process.ipc.handle("die", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    process.start()
    process.join()


def test_what_a_child_of_a_child_invokes_is_not_for_the_grandparent(context: Any) -> None:
    ipc.main.handle("pid", lambda _: os.getpid())
    method = context.get_start_method()
    worker, port = calls(ipc_children.start_a_child_that_invokes, (method,), context)
    with ending(worker), port:
        kind, text, _ = port.recv(20)
    assert kind is LookupError
    assert text.endswith("handled: none")


def test_a_start_that_fails_leaves_the_named_channels_to_the_next_try(context: Any) -> None:
    heard = Heard()
    process = context.Process(target=ipc_children.say_much, args=(0,))
    process.ipc.on("last", heard)
    mine, theirs = mpchannel.MessageChannel()
    theirs.close()
    process._args = (theirs,)
    with pytest.raises(mpchannel.DataCloneError):
        process.start()
    with pytest.raises(RuntimeError, match="not been started yet"):
        process.ipc.send("x")
    process._args = (0,)
    process.start()
    assert heard.wait()[0].sender is process
    process.join()
    mine.close()


def test_an_ended_child_leaves_nothing(context: Any) -> None:
    heard = Heard()
    ipc.main.on("last", heard)
    for _ in range(3):
        worker = Worker(ipc_children.say_much, 3, context=context)
        worker.join(20)
    heard.wait()
    del worker
    gc.collect()  # what is left is counted by the guard of every test


def test_listening_to_a_child_does_not_keep_a_worker_alive_that_does_not_want_to_be(context: Any) -> None:
    with ending(Worker(ipc_children.listen_to_a_child_that_does_not_matter, context=context)):
        pass


def test_a_process_class_may_have_an_attribute_of_that_name(context: Any) -> None:
    process = context.Process(target=ipc_children.nothing)
    process.ipc = "mine"
    process.start()
    process.join()
    assert (process.ipc, process.exitcode) == ("mine", 0)


def test_functions_that_travel_by_value_find_the_other_processs_own(context: Any) -> None:
    main, parent, own_window = ipc.main, ipc.parent, window
    with Worker(lambda: parent.send("it is", repr(parent), repr(main), repr(own_window)), context=context) as worker:
        told = Heard()
        worker.ipc.on("it is", lambda event: (told(event), told.last.set()))
        (event,) = told.wait()
        assert all(str(worker.pid) in each for each in event.args)


# The window


def test_a_preload_hands_a_port_to_the_main_world(context: Any) -> None:
    mine, theirs = mpchannel.MessageChannel()
    preload = "tests.ipc_children:hand_over"
    worker = Worker(ipc_children.main_world, preload=preload, data="the data", context=context)
    with ending(worker), mine:
        worker.ipc.post_message("main-world-port", None, [theirs])
        mine.post_message("hello, main world")
        assert mine.recv(20) == ("hello, main world", worker.pid)


def test_a_preload_that_fails_is_a_start_error(context: Any) -> None:
    errors: list[Any] = []
    with ending(Worker(ipc_children.nothing, preload=ipc_children.fail_early, context=context), 1) as worker:
        worker.onerror = errors.append
        worker.join(20)
    assert isinstance(errors[0].error, mpchannel.WorkerStartError)
    assert "in the preload" in str(errors[0].error)
    with pytest.raises(TypeError, match="preload must be a callable"):
        Worker(ipc_children.nothing, preload=3, context=context)  # type: ignore[arg-type]


def test_the_window_copies_and_calls_later() -> None:
    heard: list[Any] = []
    over = threading.Event()
    body = [1]
    mine, theirs = mpchannel.MessageChannel()
    assert window.post_message(body, [theirs])
    body.append(2)
    window.onmessage = lambda event: (heard.append(event), over.set())
    assert over.wait(20)
    (event,) = heard
    assert (event.data, event.source, event.target) == ([1], window, window)
    event.ports[0].close()
    mine.close()
    with pytest.raises(mpchannel.DataCloneError):
        window.post_message(threading.Lock())


def test_the_window_keeps_what_nobody_listens_to_up_to_a_bound(context: Any) -> None:
    worker, port = calls(ipc_children.keep_too_much_in_the_window, (), context)
    with ending(worker), port:  # it ends by itself, as nobody else can post there
        accepted, texts = port.recv(20)
        assert accepted == 1000
        assert len(texts) == 2
        assert "nobody listens to mpchannel.window" in texts[0]
        assert [port.recv(20) for _ in range(1000)] == list(range(1000))
