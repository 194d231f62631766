"""Large data whatever its shape, whatever its size, and whoever dies: equal after the trip, and nothing is left."""

from __future__ import annotations

import mmap
import random
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

import mpchannel
from mpchannel import MessageChannel

from . import buffer_children, children

pytestmark = pytest.mark.once

GIB = 1 << 30
MIB = 1 << 20
Ends = tuple[Any, Any]


@pytest.mark.timeout(600)
def test_3_gib_of_bytes_and_an_array_of_4_gib_go_there_and_back(memory_to_itself: None) -> None:
    if buffer_children.meminfo("MemAvailable") < 14 * GIB:
        pytest.skip("there and back, 4 GiB take up to 14 GiB of memory, which this machine has not to spare")
    mine, theirs = MessageChannel()
    process = mpchannel.get_context("spawn").Process(target=buffer_children.flip_and_return, args=(theirs,))
    with children.running(process), mine:
        size = 3 * GIB + 11
        got = round_trip(mine, lambda: b"".join((b"-----", bytes(3 * GIB - 8), b"middle", bytes(4), b"----")))
        assert type(got) is bytes
        assert len(got) == size
        assert (got[:6], got[3 * GIB - 4 : 3 * GIB + 4], got[-5:]) == (b"first\0", b"\0middle\0", b"\0last")
        assert not np.frombuffer(got, np.uint8)[5 : 3 * GIB - 3 : 4099].any()
        del got

        count = 4 * GIB // 8
        got = round_trip(mine, lambda: np.arange(count))
        assert (got.shape, got.dtype) == ((count,), np.arange(1).dtype)
        assert (got[0], got[-1]) == (1, 2)
        assert np.array_equal(got[1:-1:4099], np.arange(1, count - 1, 4099))
        got[count // 2] = 0  # it is the receiver's own


def round_trip(port: Any, make: Callable[[], Any]) -> Any:
    """What comes back for a message that is nowhere else."""
    port.post_message(make())
    return port.recv(300)


def pandas_frame() -> Any:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    return pandas.DataFrame(
        {"n": np.arange(50_000), "x": np.linspace(0, 1, 50_000), "text": ["a", None] * 25_000},
        index=pandas.date_range("2024-02-29", periods=50_000, freq="s"),
    )


def same_frame(one: Any, other: Any) -> bool:
    return bool(one.equals(other)) and list(one.dtypes) == list(other.dtypes) and one.index.equals(other.index)


def same_masked(one: Any, other: Any) -> bool:
    return type(one) is np.ma.MaskedArray and np.array_equal(one.mask, other.mask) and bool((one == other).all())


def same_bytes(one: Any, other: Any) -> bool:
    return bytes(one) == other.tobytes()


def anonymous_map() -> memoryview:
    mapping = mmap.mmap(-1, 300_000)
    mapping[100:106] = b"mapped"
    return memoryview(mapping)


def file_map() -> memoryview:
    with open(np.__file__, "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


RECORDS = [("id", "<i8"), ("place", "3f4"), ("name", "S5")]
CASES: dict[str, tuple[Callable[[], Any], Callable[[Any, Any], bool]]] = {
    "records": (lambda: np.array([(n, (n, 0, -n), b"abc") for n in range(20_000)], RECORDS), np.array_equal),
    "nested strides": (lambda: np.arange(4_000_000).reshape(200, 200, 100)[::-2, 5:, ::3], np.array_equal),
    "transposed": (lambda: np.arange(600_000).reshape(300, 2000).T, np.array_equal),
    "Fortran": (lambda: np.asfortranarray(np.arange(600_000).reshape(300, 2000)), np.array_equal),
    "no rows": (lambda: np.empty((0, 100_000)), np.array_equal),
    "no dimensions": (lambda: np.array(7, "i8"), np.array_equal),
    "no dimensions, large": (lambda: np.array(b"x" * 300_000), np.array_equal),
    "objects": (lambda: np.array([{"n": n} for n in range(30_000)], object), np.array_equal),
    "masked": (lambda: np.ma.masked_less(np.arange(200_000), 1_000), same_masked),
    "matrix of bools": (lambda: np.eye(900, dtype=bool), np.array_equal),
    "pandas": (pandas_frame, same_frame),
    "anonymous mmap": (anonymous_map, same_bytes),
    "mmap of a file": (file_map, same_bytes),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["port", "connection"])
def test_whatever_its_shape_it_is_equal_after_the_trip(case: str, kind: str) -> None:
    make, same = CASES[case]
    thing = make()
    one, other = MessageChannel() if kind == "port" else mpchannel.Pipe()
    with one, other:
        for _ in range(3):  # from the second time on in memory that was used before
            (one.post_message if kind == "port" else one.send)({"thing": thing})
            assert same(other.recv()["thing"], thing)


def test_arrays_are_equal_after_the_trip_through_a_pool() -> None:
    with mpchannel.WorkerPool(1) as pool:
        for make in (lambda: np.arange(500_000.0), lambda: np.arange(900_000).reshape(300, -1).T[::2]):
            array = make()
            doubled = pool.submit(np.multiply, array, 2).result(60)
            assert np.array_equal(doubled, 2 * array)
            doubled[0] = 5  # writable


@pytest.mark.timeout(300)
@pytest.mark.parametrize("who", ["sender", "receiver", "both"])
def test_a_kill_at_any_moment_leaves_no_memory_behind(who: str, memory_to_itself: None) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    dice, before, size, rounds = random.Random(seed), buffer_children.meminfo("Shmem"), 64 * MIB, 12
    fork = mpchannel.get_context("fork")
    for _ in range(rounds):
        near, far = MessageChannel()
        told, for_told = MessageChannel()
        taker = fork.Process(target=buffer_children.take_for_ever, args=(far, for_told))
        giver = fork.Process(target=buffer_children.post_for_ever, args=(near, size))
        with ExitStack() as ending, told:
            for process in (taker, giver):
                ending.enter_context(children.running(process, None))
            assert told.recv(60) == 0
            time.sleep(dice.uniform(0, 0.05))
            for process in {"sender": (giver,), "receiver": (taker,), "both": (giver, taker)}[who]:
                process.kill()
            numbers = [0, *told]
            assert numbers == list(range(len(numbers)))
        ended = {process.exitcode for process in (giver, taker)} - {-signal.SIGKILL}
        # The receiver's loop ends with the channel; the sender is told by an error that there is nobody any more.
        assert ended <= ({0} if who == "sender" else {1})
    buffer_children.wait_for_shmem_below(before + rounds * size // 2)


def test_a_post_takes_no_more_memory_than_the_message_has() -> None:
    size = 256 * MIB
    mine, theirs = MessageChannel()
    process = mpchannel.get_context("spawn").Process(target=buffer_children.memory_of_a_post, args=(theirs, size))
    with children.running(process), mine:
        array = mine.recv(60)
        assert array.sum() == size // 8
        grown, waiting = mine.recv(60)
        assert size <= waiting < 1.05 * size
        assert grown < 0.05 * size
