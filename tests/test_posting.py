"""Posting: what a message may be, that the call copies it and never waits, and what it refuses."""

from __future__ import annotations

import asyncio
import collections
import copy
import datetime
import decimal
import enum
import functools
import gc
import io
import math
import operator
import pickle
import sys
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import mpchannel
from mpchannel import BufferFull, DataCloneError

Port = mpchannel.MessagePort[Any, Any]
Ends = tuple[Port, Port]

MIB = 1 << 20
HANG = 30  # seconds; whoever waits that long is stuck

# The sizes at which a message takes another road: into the pickle, beside it, through memory of its own.
SIZES = (1, 1024, 60 * 1024, 70 * 1024, 159 * 1024, 161 * 1024, MIB, 3 * MIB)


class Colour(enum.Enum):
    RED = 1


class Point(NamedTuple):
    x: int
    y: int


@dataclass
class Job:
    name: str
    parts: list[Any]


class Slotted:
    __slots__ = ("lock", "name")

    def __init__(self, name: str, lock: Any = None) -> None:
        self.name = name
        self.lock = lock


class Plain:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


class Complaint(Exception):
    pass


class Refuses:
    """Raises what it is told to when it is pickled."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        raise self.error


class Rings:
    """Runs *fn* when it is pickled."""

    def __init__(self, fn: Callable[[], object]) -> None:
        self.fn = fn

    def __reduce__(self) -> Any:
        self.fn()
        return str, ("rang",)


THE_LOCK = threading.Lock()


def uses_a_global_lock() -> bool:
    return THE_LOCK.locked()


def numbers() -> Iterator[int]:
    yield 1


async def coroutine_function() -> None:
    pass


def through(ends: Ends, message: Any) -> Any:
    """What arrives at the other end."""
    assert ends[0].post_message(message) is True
    return ends[1].recv(HANG)


def assert_nothing_came(port: Port) -> None:
    assert mpchannel.receive_message_on_port(port) is None


# Any value


@pytest.mark.row("E12")
def test_an_empty_value_is_a_message_like_any_other(ends: Ends) -> None:
    for message in (None, 0, False, "", [], (), {}, b"", 0.0):
        ends[0].post_message(message)
        event = mpchannel.receive_message_on_port(ends[1])
        assert event is not None
        assert event.data == message
        assert type(event.data) is type(message)


VALUES = (
    42,
    -(10**40),
    1.5,
    2 + 3j,
    True,
    ...,
    "hello",
    "snow \N{SNOWMAN} \N{GRINNING FACE} \x00",
    b"\x80\x05 looks like a pickle",
    b"\x01\x02\x10\x11 looks like a note",
    bytearray(b"mutable"),
    [1, [2, [3]]],
    (1, (2, (3,))),
    {"a": 1, 2: ["b"], None: (None,)},
    {1, 2, 3},
    frozenset("abc"),
    range(3, 30, 3),
    slice(1, None, 2),
    collections.OrderedDict(b=1, a=2),
    collections.deque([1, 2], maxlen=5),
    collections.Counter("abca"),
    datetime.datetime(2024, 2, 29, 12, 30, tzinfo=datetime.UTC),
    datetime.timedelta(days=1, microseconds=3),
    decimal.Decimal("1.10"),
    Fraction(1, 3),
    uuid.UUID(int=7),
    Path("a/b"),
    Colour.RED,
    Point(1, 2),
    Job("build", [1, {"deep": {2}}]),
    operator.itemgetter,
    math.sin,
    Job,
    int,
)


@pytest.mark.row("W38", "N01")
def test_any_picklable_value_arrives_equal_and_of_the_same_type(ends: Ends) -> None:
    for message in VALUES:
        got = through(ends, message)
        assert got == message
        assert type(got) is type(message)


def test_not_a_number_and_the_infinities_arrive(channel: Ends) -> None:
    got = through(channel, [math.nan, math.inf, -math.inf, -0.0])
    assert math.isnan(got[0])
    assert got[1:3] == [math.inf, -math.inf]
    assert math.copysign(1, got[3]) == -1


def test_a_list_that_contains_itself_arrives_so(channel: Ends) -> None:
    ring: list[Any] = [1]
    ring.append(ring)
    got = through(channel, ring)
    assert got[0] == 1
    assert got[1] is got


def test_two_objects_that_refer_to_each_other_arrive_so(channel: Ends) -> None:
    one, other = Plain(name="one"), Plain(name="other")
    one.other, other.other = other, one  # type: ignore[attr-defined]
    got = through(channel, {"one": one})["one"]
    assert got.other.name == "other"
    assert got.other.other is got


def test_references_to_one_object_arrive_as_references_to_one_object(channel: Ends) -> None:
    shared = [1]
    got = through(channel, [shared, shared, [1]])
    assert got[0] is got[1]
    assert got[0] is not got[2]


def test_a_second_message_shares_nothing_with_the_first(channel: Ends) -> None:
    shared = [1]
    first, second = through(channel, shared), through(channel, shared)
    assert first == second == [1]
    assert first is not second


def test_an_exception_arrives_as_a_value(channel: Ends) -> None:
    for error in (ValueError("bad", 3), KeyError("k"), OSError(2, "gone", "file"), Complaint(), StopIteration(5)):
        got = through(channel, error)
        assert type(got) is type(error)
        assert got.args == error.args
        assert str(got) == str(error)


@pytest.mark.parametrize("size", SIZES)
def test_bytes_and_text_of_any_size_arrive_equal(channel: Ends, size: int) -> None:
    text = ("0123456789abcdef" * (size // 16 + 1))[:size]
    for message in (text, text[:-1] + "\N{SNOWMAN}", text.encode(), bytearray(text.encode())):
        got = through(channel, message)
        assert type(got) is type(message)
        assert got == message


def test_many_small_parts_arrive_equal(channel: Ends) -> None:
    message = {str(number): [number, float(number), (number,)] for number in range(20_000)}
    assert through(channel, message) == message


def test_several_large_parts_arrive_each_in_its_place(channel: Ends) -> None:
    message = [np.full(100_000, number) for number in range(5)] + [bytes([9]) * MIB]
    got = through(channel, message)
    assert [int(part[0]) for part in got] == [0, 1, 2, 3, 4, 9]
    assert all((part == part[0]).all() for part in got[:5])
    assert got[5] == message[5]


# Arrays


def _made(make: Callable[[], Any], **how: Any) -> Any:
    return pytest.param(make, id=how["id"])


def _read_only(shape: Any) -> Any:
    array = np.arange(math.prod(shape)).reshape(shape)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    "make",
    [
        _made(lambda: np.arange(10), id="small"),
        _made(lambda: np.arange(20_000, dtype="i4"), id="80 kB"),
        _made(lambda: np.arange(400_000.0), id="3 MB"),
        _made(lambda: np.zeros((0, 3)), id="empty"),
        _made(lambda: np.array(5.5), id="no dimensions"),
        _made(lambda: np.array([(1, b"a")], dtype=[("n", "i4"), ("s", "S3")]), id="records"),
        _made(lambda: np.array([1, 2], dtype=">u2"), id="other byte order"),
        _made(lambda: np.array(["2024-02-29"], dtype="M8[D]"), id="dates"),
        _made(lambda: np.array(["a", "\N{SNOWMAN}"]), id="text"),
        _made(lambda: np.arange(60).reshape(3, 4, 5)[:, ::2, ::-1], id="small strided"),
        _made(lambda: np.arange(900_000).reshape(900, 1000)[::3, ::2], id="large strided"),
        _made(lambda: np.asfortranarray(np.arange(12).reshape(3, 4)), id="small Fortran"),
        _made(lambda: np.asfortranarray(np.arange(600_000).reshape(600, 1000)), id="large Fortran"),
        _made(lambda: np.broadcast_to(np.arange(3), (4, 3)), id="broadcast"),
        _made(lambda: np.ma.masked_array([1, 2], mask=[0, 1]).filled(7), id="filled mask"),
    ],
)
def test_an_array_arrives_with_equal_content_shape_and_type(channel: Ends, make: Callable[[], Any]) -> None:
    array = make()
    got = through(channel, {"array": array})["array"]
    assert type(got) is np.ndarray
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    assert np.array_equal(got, array)
    assert got.flags.aligned


@pytest.mark.parametrize("count", [10, 20_000, 400_000])
def test_a_fortran_array_arrives_as_one(channel: Ends, count: int) -> None:
    array = np.asfortranarray(np.arange(count).reshape(2, -1))
    assert through(channel, array).flags.f_contiguous


@pytest.mark.parametrize("count", [10, 9_000, 20_000, 400_000])
def test_an_array_that_was_writable_is_writable_where_it_arrives(channel: Ends, count: int) -> None:
    got = through(channel, np.zeros(count))
    got[-1] = 7
    assert got[-1] == 7


@pytest.mark.parametrize("count", [10, 9_000, 20_000, 400_000])
def test_a_read_only_array_arrives_with_equal_content(channel: Ends, count: int) -> None:
    array = _read_only((2, count // 2))
    assert np.array_equal(through(channel, array), array)


def test_an_array_of_objects_arrives(channel: Ends) -> None:
    array = np.array([1, "two", None, [3], {"four": 4}], dtype=object)
    got = through(channel, array)
    assert got.dtype == object
    assert got.tolist() == array.tolist()


def test_arrays_that_arrived_earlier_are_not_touched_by_later_messages(channel: Ends) -> None:
    got = [through(channel, np.full(20_000, number)) for number in range(20)]
    assert [int(array[0]) for array in got] == list(range(20))
    assert all((array == array[0]).all() for array in got)


@pytest.mark.parametrize("count", [100, 100_000, 3 * MIB])
def test_a_memoryview_arrives_as_bytes_of_equal_content(channel: Ends, count: int) -> None:
    data = (b"0123456789" * (count // 10 + 1))[:count]
    assert bytes(through(channel, memoryview(data))) == data
    assert bytes(through(channel, memoryview(bytearray(data)))) == data


@pytest.mark.parametrize(
    "make",
    [
        _made(lambda: memoryview(bytes(range(100)))[::3], id="strided"),
        _made(lambda: memoryview(bytes(range(100)))[::-1], id="reversed"),
        _made(lambda: memoryview(np.arange(200_000))[::2], id="large strided"),
        _made(lambda: memoryview(np.arange(12, dtype="i4").reshape(3, 4)), id="two dimensions"),
        _made(lambda: memoryview(np.asfortranarray(np.arange(12, dtype="i4").reshape(3, 4))), id="Fortran"),
        _made(lambda: memoryview(np.asfortranarray(np.arange(60_000).reshape(3, -1))), id="large Fortran"),
        _made(lambda: memoryview(b""), id="empty"),
    ],
)
def test_a_memoryview_of_any_layout_arrives_with_the_content_of_its_tobytes(
    channel: Ends, make: Callable[[], memoryview]
) -> None:
    view = make()
    assert bytes(through(channel, view)) == view.tobytes()


# Functions and classes without an importable name


def test_a_lambda_arrives_and_works(channel: Ends) -> None:
    assert through(channel, lambda x: x + 1)(41) == 42


def test_a_closure_arrives_with_what_it_captured_at_the_time_of_posting(channel: Ends) -> None:
    captured = [1]

    def total() -> int:
        return sum(captured)

    channel[0].post_message(total)
    captured.append(10)
    assert channel[1].recv(HANG)() == 1


def test_a_local_class_and_its_instance_arrive(channel: Ends) -> None:
    class Local:
        def __init__(self, value: int) -> None:
            self.value = value

        def doubled(self) -> int:
            return 2 * self.value

    kind, made = through(channel, (Local, Local(4)))
    assert made.doubled() == 8
    assert kind(5).doubled() == 10
    assert type(made) is kind


def test_a_nested_function_among_plain_data_arrives(channel: Ends) -> None:
    got = through(channel, {"jobs": [("double", lambda x: 2 * x)], "data": np.arange(100_000)})
    assert got["jobs"][0][1](4) == 8
    assert got["data"][-1] == 99_999


def test_an_importable_function_arrives_as_itself(channel: Ends) -> None:
    assert through(channel, uses_a_global_lock) is uses_a_global_lock


# The copy is made in the call


@pytest.mark.row("N01")
def test_the_receiver_gets_a_copy_even_within_one_process(ends: Ends) -> None:
    message = {"a": [1]}
    got = through(ends, message)
    assert got == message
    assert got is not message
    assert got["a"] is not message["a"]


def test_later_changes_to_the_message_are_not_seen(channel: Ends) -> None:
    message: dict[str, Any] = {"list": [1], "bytes": bytearray(b"old")}
    channel[0].post_message(message)
    message["list"].append(2)
    message["bytes"][:] = b"new"
    message["more"] = 1
    assert channel[1].recv(HANG) == {"list": [1], "bytes": bytearray(b"old")}


@pytest.mark.parametrize("count", [10, 10_000, 20_000, 400_000])
def test_later_changes_to_an_array_are_not_seen(channel: Ends, count: int) -> None:
    array = np.zeros(count)
    channel[0].post_message(array)
    array[:] = 1
    assert not channel[1].recv(HANG).any()


def test_later_changes_to_an_array_are_not_seen_when_messages_pile_up(channel: Ends) -> None:
    array = np.zeros(20_000)
    for number in range(100):
        array[:] = number
        channel[0].post_message(array)
    for number in range(100):
        assert (channel[1].recv(HANG) == number).all()


def test_later_changes_behind_a_memoryview_are_not_seen(channel: Ends) -> None:
    data = bytearray(MIB)
    channel[0].post_message(memoryview(data))
    data[:] = b"\xff" * MIB
    assert not any(bytes(channel[1].recv(HANG)))


@pytest.mark.parametrize("count", [10, 20_000, 400_000])
def test_what_was_posted_is_not_kept_alive_until_a_garbage_collection(channel: Ends, count: int) -> None:
    gc.collect()
    gc.disable()
    try:
        array = np.zeros(count)
        posted = weakref.ref(array)
        channel[0].post_message([array])
        del array
        assert posted() is None
    finally:
        gc.enable()


def test_what_is_posted_may_be_released_at_once(channel: Ends) -> None:
    data = bytearray(MIB)
    with memoryview(data) as view:
        channel[0].post_message(view)
    data.clear()  # raises BufferError if posting still held it
    assert len(channel[1].recv(HANG)) == MIB


# Order, and what the call returns


@pytest.mark.row("X21")
def test_posting_returns_true_when_the_message_was_accepted(ends: Ends) -> None:
    assert ends[0].post_message("x") is True


@pytest.mark.row("W36", "E02")
def test_nothing_to_transfer_gives_an_empty_tuple_of_ports(channel: Ends) -> None:
    nothings: tuple[Any, ...] = (None, (), [], {}, iter(()))
    for transfer in nothings:
        assert channel[0].post_message("x", transfer) is True
        event = channel[1].receive(HANG)
        assert event.data == "x"
        assert event.ports == ()


@pytest.mark.row("W35", "N06")
def test_a_transfer_that_is_no_list_of_ports_is_a_type_error_and_nothing_is_sent(channel: Ends) -> None:
    wrong: tuple[Any, ...] = (1, 0, False, object(), "X", "", b"X", bytearray(b"X"))
    for transfer in wrong:
        with pytest.raises(TypeError, match="transfer"):
            channel[0].post_message("lost", transfer)
    channel[0].post_message("fine")
    assert channel[1].recv(HANG) == "fine"


@pytest.mark.row("H22", "W01")
def test_messages_arrive_in_posting_order(ends: Ends) -> None:
    for number in range(1000):
        ends[0].post_message(number)
    assert [ends[1].recv(HANG) for _ in range(1000)] == list(range(1000))


def test_small_and_large_messages_keep_their_order_among_each_other(ends: Ends) -> None:
    sizes = [10, 200_000, 1, 70_000, 3 * MIB, 100, 159 * 1024, 0] * 6
    for number, size in enumerate(sizes):
        ends[0].post_message((number, bytes([number % 256]) * size))
    for number, size in enumerate(sizes):
        assert ends[1].recv(HANG) == (number, bytes([number % 256]) * size)


def test_order_is_kept_while_the_receiver_takes_now_a_few_and_now_many(channel: Ends) -> None:
    posted, taken = iter(range(100_000)), 0
    for batch in (1, 500, 3, 2000, 10, 1, 4000, 50):
        for _ in range(batch):
            channel[0].post_message((next(posted), b"x" * 300))
        for _ in range(batch // 2 + 1):
            assert channel[1].recv(HANG)[0] == taken
            taken += 1
    channel[0].post_message("end")
    rest = list(iter(lambda: channel[1].recv(HANG), "end"))
    assert [number for number, _ in rest] == list(range(taken, next(posted)))


def test_both_directions_work_at_the_same_time(channel: Ends) -> None:
    for number in range(100):
        channel[0].post_message(number)
        channel[1].post_message(-number)
    assert [channel[0].recv(HANG) for _ in range(100)] == [-number for number in range(100)]
    assert [channel[1].recv(HANG) for _ in range(100)] == list(range(100))


def test_channels_do_not_mix(channel: Ends) -> None:
    with mpchannel.MessageChannel() as other:
        for number in range(50):
            channel[0].post_message(("one", number))
            other.port1.post_message(("other", number))
        assert [channel[1].recv(HANG) for _ in range(50)] == [("one", number) for number in range(50)]
        assert [other.port2.recv(HANG) for _ in range(50)] == [("other", number) for number in range(50)]


def test_a_message_may_be_posted_while_another_one_is_being_pickled(channel: Ends) -> None:
    assert channel[0].post_message(["outer", Rings(lambda: channel[0].post_message("inner"))]) is True
    assert channel[1].recv(HANG) == "inner"
    assert channel[1].recv(HANG) == ["outer", "rang"]


# Never waiting


@pytest.mark.row("H03")
def test_posting_20000_small_messages_to_a_port_never_started_does_not_block(ends: Ends) -> None:
    for number in range(20_000):
        assert ends[0].post_message(number)
    assert [ends[1].recv(HANG) for _ in range(20_000)] == list(range(20_000))


@pytest.mark.row("H03")
def test_posting_32_mib_to_a_port_never_started_does_not_block(ends: Ends) -> None:
    for number in range(32):
        assert ends[0].post_message((number, bytes([number]) * MIB))
    for number in range(32):
        assert ends[1].recv(HANG) == (number, bytes([number]) * MIB)


@pytest.mark.row("H03")
def test_posting_one_message_of_32_mib_does_not_block(channel: Ends) -> None:
    message = bytes(range(256)) * (32 * MIB // 256)
    channel[0].post_message(message)
    assert channel[1].recv(HANG) == message


@pytest.mark.row("H03")
def test_both_ends_may_post_4_mib_before_either_receives(channel: Ends) -> None:
    channel[0].post_message(b"1" * 4 * MIB)
    channel[1].post_message(b"2" * 4 * MIB)
    assert channel[0].recv(HANG) == b"2" * 4 * MIB
    assert channel[1].recv(HANG) == b"1" * 4 * MIB


@pytest.mark.row("H03")
def test_both_ends_may_post_4_mib_in_small_messages_before_either_receives(channel: Ends) -> None:
    for number in range(1024):
        channel[0].post_message((number, b"1" * 4096))
        channel[1].post_message((number, b"2" * 4096))
    for number in range(1024):
        assert channel[0].recv(HANG) == (number, b"2" * 4096)
        assert channel[1].recv(HANG) == (number, b"1" * 4096)


@pytest.mark.row("W01")
def test_no_listener_runs_inside_posting(ends: Ends) -> None:
    def listen(event: Any) -> None:
        ran_in.append(threading.get_ident())
        ran.set()

    ran_in: list[int] = []
    ran = threading.Event()
    ends[1].onmessage = listen
    ends[0].post_message("x")
    assert ran.wait(HANG)
    assert ran_in != [threading.get_ident()]


@pytest.mark.row("W01")
def test_no_listener_runs_inside_posting_on_a_loop_either(channel: Ends) -> None:
    async def main() -> None:
        got: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        channel[1].onmessage = got.set_result
        channel[0].post_message("x")
        assert not got.done()
        async with asyncio.timeout(HANG):
            assert (await got).data == "x"

    asyncio.run(main())


# Channels that are over


@pytest.mark.row("W07", "N28", "E18")
def test_posting_on_a_port_closed_here_is_silent_and_reaches_nobody(ends: Ends) -> None:
    ends[0].close()
    assert ends[0].post_message("lost") is False
    with pytest.raises(mpchannel.PortClosedError):
        ends[1].receive(HANG)


@pytest.mark.row("W06", "E19")
def test_posting_towards_a_closed_end_is_silent(ends: Ends) -> None:
    heard: list[Any] = []
    ends[1].onmessage = heard.append
    ends[1].close()
    assert ends[0].post_message("lost") is False
    assert heard == []


@pytest.mark.parametrize("closed", ["here", "there"])
@pytest.mark.parametrize("size", [200_000, 3 * MIB])
def test_posting_a_large_message_on_a_channel_that_is_over_is_silent_too(channel: Ends, closed: str, size: int) -> None:
    (channel[0] if closed == "here" else channel[1]).close()
    assert channel[0].post_message(bytes(size)) is False


def test_posting_goes_silent_when_the_other_end_closes_with_messages_piled_up(channel: Ends) -> None:
    for _ in range(2000):
        channel[0].post_message(b"x" * 1000)
    channel[1].close()
    for _ in range(1000):  # it need not be noticed at the very first
        if channel[0].post_message("more") is False:
            break
    else:
        pytest.fail("posting to a closed end goes on for ever")
    assert channel[0].post_message("more") is False


@pytest.mark.row("H01")
@pytest.mark.parametrize("closed", ["here", "there"])
def test_what_cannot_be_sent_raises_even_on_a_channel_that_is_over(channel: Ends, closed: str) -> None:
    (channel[0] if closed == "here" else channel[1]).close()
    with pytest.raises(DataCloneError):
        channel[0].post_message(threading.Lock())
    with pytest.raises(TypeError):
        channel[0].post_message("x", 1)  # type: ignore[arg-type]


@pytest.mark.row("W09", "N49")
def test_what_was_posted_right_before_closing_is_delivered(ends: Ends) -> None:
    for number in range(2000):
        ends[0].post_message((number, b"x" * 500))
    ends[0].close()
    assert [number for number, _ in ends[1]] == list(range(2000))


# What is refused


@pytest.mark.row("W20", "E26", "N38")
@pytest.mark.parametrize(
    ("make", "culprit"),
    [
        (numbers, "generator"),
        (threading.Lock, "lock"),
        (threading.RLock, "RLock"),
        (threading.Condition, "lock"),
        (threading.local, "local"),
        (sys._getframe, "frame"),
        (lambda: io.TextIOWrapper(io.FileIO(__file__)), "TextIOWrapper"),
        (lambda: io.BufferedReader(io.FileIO(__file__)), "BufferedReader"),
        (lambda: io.FileIO(__file__), "FileIO"),
        (coroutine_function, "coroutine"),
        (lambda: weakref.ref(Plain), "weakref"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_meaning_elsewhere_is_refused_by_name(channel: Ends, make: Callable[[], Any], culprit: str) -> None:
    value = make()
    with closing(value) if hasattr(value, "close") else nullcontext():
        with pytest.raises(DataCloneError, match=rf"^message.*({culprit})") as caught:
            channel[0].post_message(value)
        assert caught.value.__cause__ is not None
        del caught  # its traceback holds this very frame
    assert_nothing_came(channel[1])


@pytest.mark.row("N38")
@pytest.mark.parametrize(
    ("make", "path"),
    [
        (lambda: threading.Lock(), "message"),
        (lambda: {"jobs": [1, 2, 3, Slotted("x", threading.Lock())]}, "message['jobs'][3].lock"),
        (lambda: [[], [[threading.Lock()]]], "message[1][0][0]"),
        (lambda: (1, Plain(inner=Plain(lock=threading.Lock()))), "message[1].inner.lock"),
        (lambda: {1: {"a b": threading.Lock()}}, "message[1]['a b']"),
        (lambda: Job("build", [threading.Lock()]), "message.parts[0]"),
        (lambda: {threading.Lock(): 1}, "the key <unlocked"),
        (lambda: {frozenset([threading.Lock()])}, "the member <unlocked"),
        (lambda: functools.partial(print, 1, end=threading.Lock()), "message.keywords['end']"),
        (lambda: functools.partial(print, threading.Lock()), "message.args[0]"),
        (lambda: [_captures(threading.Lock())], "captured (captured by message[0])"),
        (lambda: [1, lambda: THE_LOCK.locked()], "THE_LOCK (used by message[1])"),
        (lambda: [0] * 5000 + [threading.Lock()], "message[5000]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_error_begins_with_the_path_to_the_culprit(channel: Ends, make: Callable[[], Any], path: str) -> None:
    with pytest.raises(DataCloneError) as caught:
        channel[0].post_message(make())
    assert str(caught.value).startswith(path)
    assert "lock" in str(caught.value)


def _captures(captured: Any) -> Callable[[], Any]:
    return lambda: captured


@pytest.mark.row("W20")
def test_the_picklers_own_error_is_the_cause(channel: Ends) -> None:
    complaint = Complaint("not this one")
    with pytest.raises(DataCloneError, match=r"^message\['part'\]: not this one") as caught:
        channel[0].post_message({"part": Refuses(complaint)})
    assert caught.value.__cause__ is complaint


@pytest.mark.row("W20")
def test_data_clone_error_is_a_type_error_too(channel: Ends) -> None:
    with pytest.raises(TypeError):
        channel[0].post_message(threading.Lock())


def test_an_error_that_is_not_about_the_message_comes_through_as_it_is(channel: Ends) -> None:
    for error in (KeyboardInterrupt, SystemExit, MemoryError):
        with pytest.raises(error):
            channel[0].post_message([Refuses(error())])
    assert through(channel, "fine") == "fine"


def test_nesting_that_is_too_deep_is_refused(channel: Ends) -> None:
    deep: list[Any] = []
    for _ in range(30_000):
        deep = [deep]
    with pytest.raises(DataCloneError, match="recursion"):
        channel[0].post_message(deep)
    assert_nothing_came(channel[1])


@pytest.mark.row("N42")
def test_a_port_in_the_message_that_is_not_listed_is_refused_by_its_path(channel: Ends) -> None:
    with mpchannel.MessageChannel() as inner:
        with pytest.raises(DataCloneError, match=r"^message\['reply'\]\[0\]: .*not in the transfer list"):
            channel[0].post_message({"reply": [inner.port1]})
        assert through((inner.port1, inner.port2), "unharmed") == "unharmed"
    assert through(channel, "fine") == "fine"


def test_a_port_by_itself_is_refused_as_a_message(channel: Ends) -> None:
    with mpchannel.MessageChannel() as inner, pytest.raises(DataCloneError, match=r"^message: "):
        channel[0].post_message(inner.port1)


@pytest.mark.row("W20")
def test_a_refused_message_changes_nothing(ends: Ends) -> None:
    ends[0].post_message("before")
    for culprit in (threading.Lock(), numbers(), [np.zeros(MIB), threading.Lock()], Refuses(Complaint())):
        with pytest.raises(DataCloneError):
            ends[0].post_message(culprit)
    assert ends[0].post_message("after") is True
    assert not ends[0].closed
    assert not ends[1].closed
    assert [ends[1].recv(HANG), ends[1].recv(HANG)] == ["before", "after"]
    assert_nothing_came(ends[1])
    assert ends[0].buffered_amount == 0


def test_a_refused_message_leaves_the_values_it_could_have_sent_alone(channel: Ends) -> None:
    array = np.arange(100_000)
    with pytest.raises(DataCloneError):
        channel[0].post_message([array, threading.Lock()])
    array[0] = 5
    assert through(channel, array)[0] == 5


def test_refusals_while_messages_pile_up_leave_no_gap(channel: Ends) -> None:
    for number in range(3000):
        channel[0].post_message((number, b"x" * 500))
        if number % 100 == 0:
            with pytest.raises(DataCloneError):
                channel[0].post_message([b"x" * 100_000, threading.Lock()])
    assert [channel[1].recv(HANG)[0] for _ in range(3000)] == list(range(3000))


# How much waits


@pytest.mark.parametrize("size", [1, 100_000, 3 * MIB])
def test_buffered_amount_is_zero_until_a_message_waits_and_after_it_was_taken(channel: Ends, size: int) -> None:
    assert channel[0].buffered_amount == 0
    channel[0].post_message(bytes(size))
    assert channel[0].buffered_amount >= size
    channel[1].recv(HANG)
    assert channel[0].buffered_amount == 0


def test_buffered_amount_covers_what_piled_up_until_the_last_message_is_taken(channel: Ends) -> None:
    for _ in range(2000):
        channel[0].post_message(b"x" * 5000)
    assert channel[0].buffered_amount >= 2000 * 5000
    for _ in range(1999):
        channel[1].recv(HANG)
        assert channel[0].buffered_amount > 0
    channel[1].recv(HANG)
    assert channel[0].buffered_amount == 0


def test_buffered_amount_of_one_direction_is_none_of_the_other_ones(channel: Ends) -> None:
    channel[0].post_message(bytes(1000))
    assert channel[1].buffered_amount == 0


def test_what_a_listener_takes_is_no_longer_buffered(channel: Ends) -> None:
    taken = threading.Semaphore(0)
    channel[1].onmessage = lambda event: taken.release()
    for _ in range(10):
        channel[0].post_message(bytes(1000))
    for _ in range(10):
        assert taken.acquire(timeout=HANG)
    assert channel[0].buffered_amount == 0


def test_drain_returns_at_once_when_nothing_waits(channel: Ends) -> None:
    channel[0].drain(0)


def test_drain_returns_when_the_other_side_took_everything(channel: Ends) -> None:
    def take() -> None:
        for _ in range(500):
            taken.append(channel[1].recv(HANG))

    taken: list[Any] = []
    for number in range(500):
        channel[0].post_message((number, b"x" * 5000))
    taker = threading.Thread(target=take)
    taker.start()
    channel[0].drain(HANG)
    assert channel[0].buffered_amount == 0
    taker.join()
    assert len(taken) == 500


def test_drain_says_when_its_time_is_over_and_loses_nothing(channel: Ends) -> None:
    channel[0].post_message("unread")
    with pytest.raises(TimeoutError, match="bytes were not taken"):
        channel[0].drain(0.001)
    assert channel[1].recv(HANG) == "unread"


@pytest.mark.parametrize("closed", ["here", "there"])
def test_drain_does_not_wait_for_a_channel_that_is_over(channel: Ends, closed: str) -> None:
    for _ in range(2000):
        channel[0].post_message(bytes(1000))
    (channel[0] if closed == "here" else channel[1]).close()
    channel[0].drain(HANG)
    assert channel[0].buffered_amount == 0


def test_there_is_no_limit_unless_one_is_set(channel: Ends) -> None:
    assert channel[0].max_buffered is None


@pytest.mark.parametrize("size", [100, 100_000, MIB])
def test_a_message_above_the_limit_raises_and_is_not_sent(channel: Ends, size: int) -> None:
    channel[0].max_buffered = 3 * size + 4000
    count = 0
    while channel[0].buffered_amount + size + 1000 < channel[0].max_buffered:
        channel[0].post_message((count, bytes(size)))
        count += 1
    assert count >= 1
    with pytest.raises(BufferFull, match=r"drain\(\)"):
        channel[0].post_message(bytes(size + 1000))
    assert [channel[1].recv(HANG)[0] for _ in range(count)] == list(range(count))
    assert_nothing_came(channel[1])


def test_a_full_port_takes_messages_again_once_the_others_were_taken(channel: Ends) -> None:
    channel[0].max_buffered = 10_000
    channel[0].post_message(bytes(5000))
    with pytest.raises(BufferFull):
        channel[0].post_message(bytes(9000))
    channel[1].recv(HANG)
    channel[0].drain(HANG)
    assert channel[0].post_message(bytes(9000)) is True


def test_a_producer_that_waits_with_drain_sends_everything_within_its_limit(channel: Ends) -> None:
    def produce() -> None:
        for number in range(1000):
            while True:
                try:
                    channel[0].post_message((number, bytes(1000)))
                    break
                except BufferFull:
                    highest.append(channel[0].buffered_amount)
                    channel[0].drain(HANG)
        channel[0].close()

    highest: list[int] = []
    channel[0].max_buffered = 50_000
    producer = threading.Thread(target=produce)
    producer.start()
    assert [number for number, _ in channel[1]] == list(range(1000))
    producer.join()
    assert max(highest, default=0) <= 50_000 + 1000 * 3


def test_the_limit_of_one_end_does_not_hold_for_the_other(channel: Ends) -> None:
    channel[0].max_buffered = 10
    assert channel[1].max_buffered is None
    assert channel[1].post_message(bytes(1000)) is True


def test_a_limit_can_be_lifted(channel: Ends) -> None:
    channel[0].max_buffered = 10
    channel[0].max_buffered = None
    assert through(channel, bytes(1000)) == bytes(1000)


def test_a_limit_that_is_no_positive_number_of_bytes_is_refused(channel: Ends) -> None:
    channel[0].max_buffered = 1000
    for limit in (0, -1, 1.5, "10"):
        with pytest.raises(ValueError, match="max_buffered"):
            channel[0].max_buffered = limit  # type: ignore[assignment]
    assert channel[0].max_buffered == 1000


def test_a_full_port_detaches_nothing(channel: Ends) -> None:
    with mpchannel.MessageChannel() as inner:
        channel[0].max_buffered = 1000
        with pytest.raises(BufferFull):
            channel[0].post_message(bytes(2000), [inner.port1])
        assert not inner.port1.detached
        assert through((inner.port1, inner.port2), "unharmed") == "unharmed"
    assert_nothing_came(channel[1])


# The objects themselves


@pytest.mark.row("E11")
def test_a_channel_has_two_ports_and_can_be_unpacked_into_them() -> None:
    with mpchannel.MessageChannel() as channel:
        one, other = channel
        assert one is channel.port1
        assert other is channel.port2
        assert one is not other


@pytest.mark.row("N12")
def test_a_port_cannot_be_made_by_itself() -> None:
    with pytest.raises(TypeError, match="MessageChannel"):
        mpchannel.MessagePort()


def test_plain_pickle_and_copy_refuse_ports_and_say_what_to_do(channel: Ends) -> None:
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="transfer="):
            attempt(channel[0])
    assert through(channel, "unharmed") == "unharmed"
