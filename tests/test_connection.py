"""``Pipe()`` and ``Connection``: what the standard library promises, and what it does not."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import mpchannel
from mpchannel.connection import Connection, Pipe

from . import children
from .children import running

Ends = tuple[Connection, Connection]
BIG = 4 << 20


@pytest.fixture
def pipe() -> Iterator[Ends]:
    one, other = Pipe()
    yield one, other
    one.close()
    other.close()


# Messages


@pytest.mark.parametrize("message", [None, 0, b"", "text", [1, {"two": (3,)}], bytes(200_000), b"\x80not a pickle"])
def test_what_is_sent_is_received(pipe: Ends, message: Any) -> None:
    for one, other in (pipe, pipe[::-1]):
        one.send(message)
        assert other.recv() == message


@pytest.mark.parametrize("data", [b"", b"x", b"\x80\x05N.", bytes(300_000), b"\x10\x11\x05\x02"])
def test_bytes_arrive_as_they_are(pipe: Ends, data: bytes) -> None:
    pipe[0].send_bytes(data)
    assert pipe[1].recv_bytes() == data


def test_objects_and_bytes_mix_as_pickles(pipe: Ends) -> None:
    one, other = pipe
    one.send_bytes(pickle.dumps(["as bytes"]))
    assert other.recv() == ["as bytes"]
    one.send(["as an object"])
    assert pickle.loads(other.recv_bytes()) == ["as an object"]
    one.send(np.arange(100_000))
    assert (pickle.loads(other.recv_bytes()) == np.arange(100_000)).all()


def test_offset_and_size_choose_a_part(pipe: Ends) -> None:
    one, other = pipe
    one.send_bytes(b"0123456789", 2, 5)
    one.send_bytes(b"0123456789", 7)
    assert [other.recv_bytes(), other.recv_bytes()] == [b"23456", b"789"]
    one.send_bytes(np.arange(4, dtype="u4"), 4, 8)
    assert other.recv_bytes() == np.arange(1, 3, dtype="u4").tobytes()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda one: one.send_bytes(b"abc", -1), "offset is negative"),
        (lambda one: one.send_bytes(b"abc", 4), "buffer length < offset"),
        (lambda one: one.send_bytes(b"abc", 0, -1), "size is negative"),
        (lambda one: one.send_bytes(b"abc", 1, 3), r"buffer length < offset \+ size"),
        (lambda one: one.recv_bytes(-1), "negative maxlength"),
        (lambda one: one.recv_bytes_into(bytearray(3), -1), "negative offset"),
        (lambda one: one.recv_bytes_into(bytearray(3), 4), "offset too large"),
        (lambda one: Connection(-1), "invalid handle"),
        (lambda one: Connection(one.fileno(), False, False), "at least one of"),
    ],
)
def test_bad_arguments_are_refused_in_the_same_words_and_nothing_is_lost(pipe: Ends, call: Any, text: str) -> None:
    one, other = pipe
    other.send("still there")
    with pytest.raises(ValueError, match=text):
        call(one)
    assert one.recv() == "still there"


def test_receiving_into_a_buffer_says_how_much_and_loses_nothing_that_is_too_long(pipe: Ends) -> None:
    one, other = pipe
    room = bytearray(b"..........")
    one.send_bytes(b"abc")
    assert other.recv_bytes_into(room, 2) == 3
    assert room == b"..abc....."
    one.send_bytes(b"longer than ten")
    with pytest.raises(multiprocessing.BufferTooShort) as caught:
        other.recv_bytes_into(room)
    assert caught.value.args == (b"longer than ten",)
    assert room == b"..abc....."


def test_a_message_above_maxlength_ends_the_reading_as_in_the_standard_library(pipe: Ends) -> None:
    one, other = pipe
    one.send_bytes(b"12345")
    assert other.recv_bytes(5) == b"12345"
    one.send_bytes(b"123456")
    with pytest.raises(OSError, match="bad message length"):
        other.recv_bytes(5)
    assert not other.readable
    assert other.writable
    reader, writer = Pipe(False)
    with writer:
        writer.send_bytes(b"123456")
        with pytest.raises(OSError, match="bad message length"):
            reader.recv_bytes(5)
        assert reader.closed


def test_simplex_ends_do_one_thing_only() -> None:
    reader, writer = Pipe(duplex=False)
    with reader, writer:
        assert (reader.readable, reader.writable, writer.readable, writer.writable) == (True, False, False, True)
        writer.send(1)
        assert reader.recv() == 1
        for call in (lambda: reader.send(1), lambda: reader.send_bytes(b"")):
            with pytest.raises(OSError, match="connection is read-only"):
                call()
        for call in (writer.recv, writer.recv_bytes, writer.poll):
            with pytest.raises(OSError, match="connection is write-only"):
                call()


def test_what_cannot_be_pickled_raises_the_very_error_with_the_path_and_sends_nothing(pipe: Ends) -> None:
    class Refuses:
        def __reduce__(self) -> Any:
            raise ZeroDivisionError("not me")

    one, other = pipe
    with pytest.raises(ZeroDivisionError, match="not me"):
        one.send([Refuses()])
    with pytest.raises(TypeError, match="cannot pickle") as caught:
        one.send({"jobs": [threading.Lock()]})
    assert "message['jobs'][0]" in caught.value.__notes__[0]
    assert not other.poll()


def test_what_cannot_be_loaded_raises_the_very_error_and_the_next_message_comes(pipe: Ends) -> None:
    one, other = pipe
    one.send_bytes(b"\x80\x05cno.such.module\nthing\n.")
    one.send("next")
    with pytest.raises(ModuleNotFoundError, match="no"):
        other.recv()
    assert other.recv() == "next"


@pytest.mark.parametrize("cut_off", [b"\x80", b"\x80\x04\x95"])
def test_a_pickle_that_is_cut_off_is_an_error_and_not_the_message_before(pipe: Ends, cut_off: bytes) -> None:
    one, other = pipe
    one.send({"secret": 1})
    assert other.recv() == {"secret": 1}
    one.send_bytes(cut_off)
    with pytest.raises((EOFError, pickle.UnpicklingError)):
        other.recv()
    one.send("next")
    assert other.recv() == "next"


def test_functions_that_no_other_process_could_import_are_sent_by_value(pipe: Ends) -> None:
    offset = 5
    pipe[0].send(lambda value: value + offset)
    assert pipe[1].recv()(1) == 6


def test_large_arrays_arrive_writable_and_whole(pipe: Ends) -> None:
    array = np.arange(1_000_000)
    pipe[0].send({"array": array})
    got = pipe[1].recv()["array"]
    assert (got == array).all()
    got[0] = 7
    assert array[0] == 0


def test_ports_move_through_a_connection_and_connections_through_a_port(pipe: Ends) -> None:
    mine, moving = mpchannel.MessageChannel()
    pipe[0].send(["a port", moving])
    arrived = pipe[1].recv()[1]
    mine.post_message("hello")
    assert arrived.recv(20) == "hello"
    with pytest.raises(mpchannel.PortDetachedError, match=r"sent through <mpchannel\.connection\.Connection"):
        moving.recv()
    mine.close()
    arrived.close()


def test_a_connection_in_a_message_is_shared_and_survives_its_sender(context: Any) -> None:
    port, theirs = mpchannel.MessageChannel()
    one, other = Pipe()
    with running(context.Process(target=children.make_a_pipe_and_send_it_away, args=(theirs, one))):
        pass  # its sender is gone
    first, second = port.recv(20), other.recv()
    first.send("through what came by a port")
    assert second.recv() == "through what came by a port"
    second.close()
    with pytest.raises(EOFError):
        first.recv()
    first.close()
    port.close()
    one.close()
    other.close()


@pytest.mark.parametrize("door", ["post_message", "post_message with a port", "send", "Connection.send"])
def test_both_copies_of_a_connection_in_a_message_are_usable(pipe: Ends, door: str) -> None:
    one, other = pipe
    port1, port2 = mpchannel.MessageChannel()
    extra, moving = mpchannel.MessageChannel()
    carrier = Pipe()
    message = {"an end": other, "again": [other]}
    if door == "Connection.send":
        carrier[0].send(message)
        got = carrier[1].recv()
    else:
        if door == "send":
            port1.send(message)
        else:
            port1.post_message(message, [moving] if "with" in door else ())
        event = port2.receive(20)
        got = event.data
        assert len(event.ports) == ("with" in door)
        for each in event.ports:
            each.close()
    arrived = got["an end"]
    assert got["again"] == [arrived]
    assert arrived is not other
    arrived.send("by the copy")
    other.send("by the first")
    assert [one.recv(), one.recv()] == ["by the copy", "by the first"]
    arrived.close()
    assert not one.poll(0)
    for each in (port1, port2, extra, moving, *carrier):
        each.close()


def test_a_connection_is_not_listed_and_a_closed_one_not_sent(pipe: Ends) -> None:
    port1, port2 = mpchannel.MessageChannel()
    with port1, port2:
        with pytest.raises(mpchannel.DataCloneError, match="do not list it"):
            port1.post_message(1, [pipe[0]])
        pipe[0].close()
        with pytest.raises(mpchannel.DataCloneError, match="is a closed Connection"):
            port1.post_message([pipe[0]])
        with pytest.raises(OSError, match="handle is closed"):
            pipe[1].send([pipe[0]])
        assert not port2.poll()
        assert port1.post_message("goes on")
        assert port2.recv(20) == "goes on"


# Never waiting


def test_both_sides_may_send_before_either_receives(pipe: Ends) -> None:
    one, other = pipe
    one.send_bytes(bytes(BIG))
    other.send_bytes(bytes(BIG))
    for number in range(5000):
        one.send(number)
    other.send("there")
    assert len(other.recv_bytes()) == BIG
    assert len(one.recv_bytes()) == BIG
    assert [other.recv() for _ in range(5000)] == list(range(5000))
    assert one.recv() == "there"


@pytest.mark.parametrize("size", [10, 5000, 100_000, 300_000])
def test_a_flood_is_kept_in_order_and_readable_means_a_message(pipe: Ends, size: int) -> None:
    one, other = pipe
    count = 20_000_000 // (size + 10_000)
    for number in range(count):
        one.send((number, bytes(size)))
    for number in range(count):
        assert other.poll(0)
        assert multiprocessing.connection.wait([other], 0) == [other]
        assert other.recv() == (number, bytes(size))
    assert not other.poll(0)
    assert multiprocessing.connection.wait([other], 0) == []


def test_eight_threads_may_send_and_four_receive_on_the_same_ends(pipe: Ends) -> None:
    one, other = pipe
    sizes = (10, 3000, 100_000, 200_000)

    def send(name: int) -> None:
        for number in range(100):
            one.send((name, number, bytes([name]) * sizes[number % 4]))

    def receive() -> list[Any]:
        return [other.recv() for _ in range(200)]

    with ThreadPoolExecutor(12) as pool:
        receiving = [pool.submit(receive) for _ in range(4)]
        for sending in [pool.submit(send, name) for name in range(8)]:
            sending.result(60)
        got = [message for each in receiving for message in each.result(60)]
    assert sorted((name, number) for name, number, _ in got) == [(n, m) for n in range(8) for m in range(100)]
    assert all(body == bytes([name]) * sizes[number % 4] for name, number, body in got)


# Closing


@pytest.mark.parametrize("way", ["recv", "recv_bytes", "poll"])
def test_close_wakes_who_waits_in_another_thread(way: str) -> None:
    one, other = Pipe()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(getattr(other, way), *([None] if way == "poll" else ()))
        children.wait_until_asleep()
        other.close()
        with pytest.raises(OSError, match="handle is closed"):
            waiting.result(20)
    one.close()


@pytest.mark.parametrize("collect", [False, True])
def test_the_other_side_gets_eof_behind_every_message(pipe: Ends, collect: bool) -> None:
    one, other = Pipe()
    for number in range(3000):
        one.send(number)
    if collect:
        del one
    else:
        one.close()
    assert [other.recv() for _ in range(3000)] == list(range(3000))
    for call in (other.recv, other.recv_bytes, lambda: other.recv_bytes_into(bytearray(1)), other.recv):
        assert other.poll(0)
        with pytest.raises(EOFError):
            call()
    with pytest.raises(BrokenPipeError):
        other.send(1)
    with pytest.raises(BrokenPipeError):
        other.send_bytes(b"1")
    other.close()


def test_unread_messages_do_not_hide_what_the_other_side_had_sent() -> None:
    one, other = Pipe()
    one.send("unread")
    other.send("read")
    other.close()
    assert one.recv() == "read"
    with pytest.raises(EOFError):
        one.recv()
    one.close()


def test_a_closed_end_says_so(pipe: Ends) -> None:
    one, _ = pipe
    with one as same:
        assert same is one
        assert not one.closed
    one.close()
    assert one.closed
    assert repr(one) == "<mpchannel.connection.Connection, closed>"
    for call in (one.recv, one.recv_bytes, one.poll, one.fileno, lambda: one.send(1), lambda: one.send_bytes(b"")):
        with pytest.raises(OSError, match="handle is closed"):
            call()


def test_repr_tells_the_descriptor_and_the_way(pipe: Ends) -> None:
    assert repr(pipe[0]) == f"<mpchannel.connection.Connection, fd {pipe[0].fileno()}, both ways>"
    assert isinstance(pipe[0], multiprocessing.connection.Connection)


@pytest.mark.parametrize("timeout", [0, 0.01, -1])
def test_poll_gives_up_in_time(pipe: Ends, timeout: float) -> None:
    assert pipe[0].poll(timeout) is False
    pipe[1].send(1)
    assert pipe[0].poll(timeout) is True


def test_wait_takes_connections_ports_and_sockets_together(pipe: Ends) -> None:
    port1, port2 = mpchannel.MessageChannel()
    near, far = socket.socketpair()
    with port1, port2, near, far:
        assert mpchannel.wait([pipe[0], port1, near], 0) == []
        pipe[1].send(1)
        port2.post_message(2)
        assert mpchannel.connection.wait([pipe[0], port1, near], 20) == [pipe[0], port1]


@pytest.mark.parametrize("dump", [pickle.dumps, lambda each: __import__("copy").copy(each)])
def test_a_connection_is_not_copied_without_saying_how(pipe: Ends, dump: Any) -> None:
    with pytest.raises(TypeError, match="give it to a Process as an argument"):
        dump(pipe[0])


def test_a_descriptor_of_another_kind_makes_a_connection_of_the_standard_library() -> None:
    reader, writer = os.pipe()
    with (
        Connection(reader, writable=False) as one,
        multiprocessing.connection.Connection(writer, readable=False) as other,
    ):
        assert type(one) is multiprocessing.connection.Connection
        other.send("over a pipe")
        assert one.recv() == "over a pipe"


def test_a_default_timeout_for_sockets_changes_no_descriptor(pipe: Ends) -> None:
    stream, far = socket.socketpair()  # of another kind: looked at, and left to the standard library
    socket.setdefaulttimeout(5)
    try:
        for number in (pipe[0].fileno(), stream.fileno()):
            with Connection(os.dup(number)) as copy:
                assert os.get_blocking(copy.fileno())
    finally:
        socket.setdefaulttimeout(None)
        stream.close()
        far.close()


def test_nothing_is_left_of_a_thousand_pipes() -> None:
    for _ in range(1000):
        one, other = Pipe()
        one.send(1)
        assert other.recv() == 1


# Between processes


def test_a_child_that_closes_the_parents_end_echoes_and_sees_the_end(context: Any) -> None:
    one, other = context.Pipe()
    with running(context.Process(target=children.echo_until_eof, args=(other, one))):
        other.close()
        for message in (1, "x", bytes(300_000), np.arange(1_000_000)):
            one.send(message)
            assert np.array_equal(one.recv(), message)
        for number in range(3000):
            one.send(number)
        assert [one.recv() for _ in range(3000)] == list(range(3000))
        one.close()


@pytest.mark.parametrize("make", [multiprocessing.get_context], ids=["stdlib"])
def test_the_standard_librarys_processes_take_them_as_well(make: Any, start_method: str) -> None:
    one, other = Pipe()
    with running(make(start_method).Process(target=children.echo_until_eof, args=(other,))):
        other.close()
        one.send("hello")
        assert one.recv() == "hello"
        one.close()


def test_both_copies_of_a_shared_end_are_usable_and_eof_comes_with_the_last(context: Any) -> None:
    one, other = context.Pipe()
    process = context.Process(target=children.send_all, args=(other, "theirs"))
    with running(process):
        pass
    other.send("ours")
    assert [one.recv(), one.recv()] == ["theirs", "ours"]
    assert not one.poll(0)
    other.close()
    with pytest.raises(EOFError):
        one.recv()
    one.close()


@pytest.mark.leaves("the heap of shared ctypes")
@pytest.mark.parametrize("slowly", [False, True])
def test_processes_that_take_turns_at_one_end_send_in_the_order_of_their_turns(context: Any, slowly: bool) -> None:
    count = 1500
    one, other = context.Pipe()
    counter = context.Value("i", 0)
    processes = [context.Process(target=children.send_in_turn, args=(other, counter, count)) for _ in range(3)]
    with running(processes[0]), running(processes[1]), running(processes[2]):
        for _ in range(count):
            with counter.get_lock():
                other.send((counter.value, b"from the parent"))
                counter.value += 1
        other.close()
        if slowly:
            for each in processes:
                each.join(60)
        got = []
        while True:
            try:
                got.append(one.recv()[0])
            except EOFError:
                break
    assert got == list(range(4 * count))
    one.close()


def test_two_copies_of_an_end_in_one_process_send_in_the_order_of_their_turns(pipe: Ends) -> None:
    one, other = pipe
    carrier, arrives = Pipe()
    carrier.send(other)
    copy = arrives.recv()
    for number in range(2000):
        (other, copy)[number // 300 % 2].send((number, bytes(2000)))
    for each in (other, copy, carrier, arrives):
        each.close()
    assert [one.recv()[0] for _ in range(2000)] == list(range(2000))


def test_an_end_passed_by_its_number_is_shared(pipe: Ends) -> None:
    one, other = pipe
    script = """
        import sys
        from mpchannel.connection import Connection
        end = Connection(int(sys.argv[1]))
        for number in range(600):
            end.send(("child", number, bytes(2000)))
    """
    for _ in range(2):  # each of the two finds a file of the other's
        for number in range(600):
            other.send(("parent", number, bytes(2000)))
        command = [sys.executable, "-c", textwrap.dedent(script), str(other.fileno())]
        subprocess.run(command, pass_fds=[other.fileno()], check=True, timeout=60)
    expected = [(who, number) for who in ("parent", "child") * 2 for number in range(600)]
    assert [one.recv()[:2] for _ in range(2400)] == expected


def test_processes_that_take_turns_at_one_end_receive_each_message_once_and_in_order(context: Any) -> None:
    count = 1500
    one, other = context.Pipe()
    results, into = context.Pipe(False)
    for number in range(4 * count):
        one.send((number, bytes(number % 300)))
    lock = context.Lock()
    processes = [context.Process(target=children.receive_in_turn, args=(other, lock, into, count)) for _ in range(3)]
    with running(processes[0]), running(processes[1]), running(processes[2]):
        mine = []
        for _ in range(count):
            with lock:
                mine.append(other.recv()[0])
        lists = [mine, *(results.recv() for _ in processes)]
    assert all(each == sorted(each) for each in lists)
    assert sorted(number for each in lists for number in each) == list(range(4 * count))
    for each in (one, other, results, into):
        each.close()


def test_a_process_may_poll_without_the_lock_of_those_that_receive(pipe: Ends) -> None:
    one, other = pipe
    gate, held = mpchannel.MessageChannel()
    with running(mpchannel.get_context("fork").Process(target=children.poll_slowly, args=(other, held))):
        assert gate.recv(20) == "ready"
        for start in range(0, 100_000, 400):
            for number in range(start, start + 400):  # more than the socket holds
                one.send(number)
            assert [other.recv() for _ in range(400)] == list(range(start, start + 400))
        gate.post_message("stop")
    gate.close()


def test_eof_comes_although_siblings_live_that_were_forked_meanwhile(context: Any) -> None:
    one, other = context.Pipe()
    gate, held = mpchannel.MessageChannel()
    worker = context.Process(target=children.wait_for_eof, args=(other,))
    sibling = context.Process(target=children.end_when_told, args=(held, "return"))
    with running(sibling):
        assert gate.recv(20) == "ready"
        with running(worker, ends_with=-9):
            other.close()
            worker.kill()
            with pytest.raises(EOFError):
                one.recv()
            one.close()
        gate.post_message("go")
        gate.close()


def test_a_worker_sees_the_end_of_its_parents_pipe_although_siblings_were_forked_later(context: Any) -> None:
    pipes = [context.Pipe() for _ in range(3)]
    workers = [context.Process(target=children.wait_for_eof, args=(other,)) for _, other in pipes]
    with running(workers[0]), running(workers[1]), running(workers[2]):
        for (one, other), worker in zip(pipes, workers, strict=True):
            other.close()
            one.close()
            worker.join(20)
            assert worker.exitcode == 0


def test_a_child_may_make_pipes_of_its_own(context: Any) -> None:
    results, into = context.Pipe(False)
    with running(context.Process(target=children.make_one_pair_and_talk, args=(into,))):
        into.close()
        assert results.recv() == "own"
    results.close()


# Under fork: what the code of a child can reach


@pytest.fixture
def global_pipe() -> Iterator[Connection]:
    one, other = Pipe()
    children.GLOBAL_PIPE[:] = [other]
    yield one
    children.GLOBAL_PIPE.clear()
    one.close()
    other.close()


@pytest.mark.parametrize("family", [mpchannel, multiprocessing])
def test_a_target_may_use_a_connection_that_it_finds_in_a_global(global_pipe: Connection, family: Any) -> None:
    context = family.get_context("fork")
    with running(context.Process(target=children.send_through_a_global, args=("by a function it calls",))):
        assert global_pipe.recv() == "by a function it calls"
    with running(context.Process(target=children.SenderByMethod().work)):
        assert global_pipe.recv() == "by method"
    with running(context.Process(target=lambda: children.GLOBAL_PIPE[0].send("by a module's attribute"))):
        assert global_pipe.recv() == "by a module's attribute"
    package = types.ModuleType("package")
    package.state = types.SimpleNamespace(connection=children.GLOBAL_PIPE[0])  # type: ignore[attr-defined]
    package.inner = types.ModuleType("package.inner")  # type: ignore[attr-defined]
    package.inner.state = package.state  # type: ignore[attr-defined]
    package.__file__ = package.inner.__file__ = __file__  # type: ignore[attr-defined]
    sys.modules.update({"package": package, "package.inner": package.inner})  # type: ignore[attr-defined]
    try:
        with running(context.Process(target=send_through_a_module_of_a_module)):
            assert global_pipe.recv() == "by a module of a module"
    finally:
        del sys.modules["package"], sys.modules["package.inner"]


def send_through_a_module_of_a_module() -> None:
    import package  # type: ignore[import-not-found]

    package.inner.state.connection.send("by a module of a module")


class SendingHandler(logging.Handler):
    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        self.connection.send(record.getMessage())


def log_something() -> None:
    logging.getLogger("of this test").warning("through a log handler")


def test_a_target_may_log_to_a_handler_that_holds_a_connection(pipe: Ends) -> None:
    one, other = pipe
    handler = SendingHandler(other)
    logging.getLogger("of this test").addHandler(handler)
    try:
        with running(mpchannel.get_context("fork").Process(target=log_something)):
            assert one.poll(20)
            assert one.recv() == "through a log handler"
    finally:
        logging.getLogger("of this test").removeHandler(handler)


def test_an_argument_of_an_odd_class_costs_the_child_no_connection(pipe: Ends) -> None:
    odd = eval("type('Odd', (), {})", {"__builtins__": {"type": type}})  # it has no __module__
    one, other = pipe
    process = mpchannel.get_context("fork").Process(
        target=lambda connection, _: connection.send(2), args=(other, odd())
    )
    with running(process):
        assert one.poll(20)
        assert one.recv() == 2


def test_a_pools_workers_keep_what_their_tasks_may_use(global_pipe: Connection) -> None:
    with mpchannel.get_context("fork").Pool(1) as pool:
        pool.apply(children.send_through_a_global, ("by a task",))
        assert global_pipe.recv() == "by a task"
        pool.terminate()
        pool.join()


def test_a_raw_fork_shares_connections_as_ever(pipe: Ends) -> None:
    one, other = pipe
    assert children.in_raw_child(lambda: other.send("raw")) is None
    assert one.recv() == "raw"


def test_a_forked_child_holds_no_connection_that_nothing_leads_to_and_says_why() -> None:
    one, other = Pipe()
    results, into = Pipe(False)
    link = os.readlink(f"/proc/self/fd/{other.fileno()}")
    context = mpchannel.get_context("fork")
    with running(context.Process(target=children.use_inherited, args=(into, other.fileno()))):
        assert results.recv() != link

    def look() -> None:
        found = [each for each in gc.get_objects() if isinstance(each, Connection) and each.closed]
        texts = set()
        for each in found:
            try:
                each.send(1)
            except OSError as error:
                texts.add(str(error))
        into.send(texts)

    with running(context.Process(target=look)):
        assert any("pass it in args" in text for text in results.recv())
    for each in (one, other, results, into):
        each.close()


def test_a_thread_that_waits_during_a_fork_goes_on_waiting(pipe: Ends) -> None:
    one, other = pipe
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(one.recv)
        children.wait_until_asleep()
        with running(mpchannel.get_context("fork").Process(target=time.sleep, args=(0,))):
            pass
        other.send("after the fork")
        assert waiting.result(20) == "after the fork"
