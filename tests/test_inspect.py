"""``repr(port)`` and ``inspect()``: who holds what, and what waits where."""

from __future__ import annotations

import json
import os
import resource
import threading
from typing import Any

import pytest

import mpchannel
from mpchannel import MessageChannel, WorkerPool, _sockdiag, inspect

from . import children
from .children import Port, running


def shown(port: Port) -> dict[str, Any]:
    """What ``inspect`` says of a port."""
    (found,) = (each for each in json.loads(json.dumps(inspect()))["ports"] if each["id"] == port._identity)
    return dict(found)


def test_repr_tells_what_waits_both_ways(ends: Any) -> None:
    near, far = ends
    assert "message" not in repr(near)
    for number in range(3):
        near.post_message(number)
    assert ", out 3 messages (15 bytes), " in repr(near)
    assert ", in 3 messages (15 bytes), " in repr(far)
    far.recv()
    assert ", out 2 messages (10 bytes), " in repr(near)
    far.recv()
    far.recv()
    assert "message" not in repr(near)
    assert "message" not in repr(far)


def test_repr_tells_of_who_has_ended(context: Any) -> None:
    near, far = MessageChannel()
    with running(context.Process(target=children.end_when_told, args=(far, "SIGKILL")), ends_with=-9) as process:
        assert near.recv(20) == "ready"
        assert f"other end in process {process.pid}, " in repr(near)
        assert "ended" not in repr(near)
        near.post_message("now")
    assert f"other end in process {process.pid}, which has ended, " in repr(near)
    near.close()


def test_repr_tells_the_age(channel: Any) -> None:
    channel[0]._born -= 7.25
    assert repr(channel[0]).endswith("7.2 s old>") or repr(channel[0]).endswith("7.3 s old>")
    assert channel[0].age >= 7.25


def test_repr_never_raises(ends: Any) -> None:
    near, far = ends
    near.post_message("x")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))  # no descriptor for anything
    try:
        text = repr(near), repr(far)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert all(each.startswith("<MessagePort ") for each in text)
    far.close()
    assert "closed" in repr(far)
    kept, given = MessageChannel()
    other = MessageChannel()
    other.port1.post_message(None, transfer=[given])
    assert "posted through" in repr(given)
    for each in (kept, *other):
        each.close()


def test_looking_takes_nothing_and_wakes_nobody(ends: Any) -> None:
    near, far = ends
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(far.recv(20)))
    thread.start()
    for _ in range(50):
        repr(far)
        inspect()
    assert not got
    near.post_message("now")
    thread.join(20)
    assert got == ["now"]
    near.post_message("next")
    assert shown(far)["in"]["messages"] == 1
    assert far.recv(10) == "next"


def test_a_port_as_data(ends: Any) -> None:
    near, far = ends
    far.on("message", print)
    near.post_message("x" * 100)
    said = shown(far)
    assert said.pop("age") >= 0
    size = said["in"]["bytes"]
    assert 100 < size < 130
    assert said == {
        "id": far._identity,
        "kind": "MessagePort",
        "state": "open",
        "started": False,
        "listeners": {"message": 1},
        "peer": {"pid": os.getpid(), "here": True, "alive": True},
        "in": {"messages": 1, "exact": True, "bytes": size},
        "out": {"messages": 0, "exact": True, "bytes": 0},
    }
    assert shown(near)["out"] == said["in"]


def test_messages_of_other_sizes_are_told_as_an_upper_bound(channel: Any) -> None:
    near, far = channel
    for size in (10, 500, 5000):
        near.post_message(bytes(size))
    said = shown(near)["out"]
    assert said["messages"] >= 3
    assert not said["exact"]
    assert 5510 < said["bytes"] < 5600
    assert shown(far)["in"] == said


def test_an_overflow_file_counts(channel: Any) -> None:
    near, far = channel
    for number in range(20_000):
        near.post_message(number)
    assert shown(near)["out"]["messages"] is None
    assert shown(near)["out"]["bytes"] > 100_000
    assert far.recv(10) == 0
    while far.recv(10) < 19_999:
        pass
    assert shown(near)["out"]["bytes"] == shown(far)["in"]["bytes"] == 0


@pytest.mark.parametrize("sizes", [[1], [192] * 4, [0] * 5, [193] * 3, [100] * 200, [700, 1, 1], [40_000]])
def test_packets_are_counted_or_bounded(sizes: list[int]) -> None:
    one, other = mpchannel._kernel.socket_pair()
    for size in sizes:
        one.send(bytes(size))
    found = _sockdiag.unix_socket(os.fstat(other.fileno()).st_ino)
    assert found is not None
    near = _sockdiag.unix_socket(found.peer)
    assert near is not None
    assert found.waiting == sum(sizes)
    count, exact = _sockdiag.packets(found.waiting, near.held)
    assert count == len(sizes) if exact else count >= len(sizes)
    assert exact or max(sizes) > 192 or len(sizes) > 5
    assert _sockdiag.unix_sockets()[found.inode] == found


def test_closed_and_moved_ports_are_not_listed() -> None:
    before = {each["id"] for each in inspect()["ports"]}
    with MessageChannel() as (one, other):
        assert {each["id"] for each in inspect()["ports"]} - before == {one._identity, other._identity}
    assert {each["id"] for each in inspect()["ports"]} <= before


def test_ports_are_listed_from_the_oldest_on() -> None:
    channels = [MessageChannel() for _ in range(20)]
    mine = [port._identity for each in channels for port in each]
    assert [each["id"] for each in inspect()["ports"] if each["id"] in mine] == mine
    for each in channels:
        with each:
            pass


def test_workers_are_listed_while_they_run() -> None:
    worker = mpchannel.Worker("signal:pause", name="lister")
    try:
        (said,) = inspect()["workers"]
        assert (said["name"], said["pid"], said["alive"], said["ref"]) == ("lister", worker.pid, True, True)
        assert said["port"] in {each["id"] for each in inspect()["ports"]}
    finally:
        worker.terminate()
        worker.join(20)
    assert inspect()["workers"] == []


def block(port: Port) -> None:
    port.post_message(os.getpid())
    port.recv()


def test_pool_calls_are_listed_until_they_are_answered() -> None:
    near, far = MessageChannel()
    with WorkerPool(1, name="narrow") as pool:
        first = pool.submit(block, far)
        later = pool.submit(os.getpid)
        pid = near.recv(20)
        said = [each for each in inspect()["calls"] if each["kind"] == "pool"]
        assert [(each["name"], each["running"]) for each in said] == [("block", True), ("getpid", False)]
        assert (said[0]["pid"], said[0]["through"]) == (pid, "narrow")
        assert said[0]["seconds"] > 0
        (about,) = (each for each in inspect()["pools"] if each["name"] == "narrow")
        assert [each["pid"] for each in about["workers"]] == [pid]
        near.post_message("go on")
        first.result(20)
        assert later.result(20) == pid
        assert inspect()["calls"] == []
    near.close()


class Slow:
    def __init__(self, gate: Port) -> None:
        self.gate = gate

    def answer(self) -> int:
        self.gate.post_message("asked")
        return int(self.gate.recv(20))


def test_remote_calls_are_listed_until_they_are_answered() -> None:
    (near, far), (gate, keeper) = MessageChannel(), MessageChannel()
    mpchannel.expose(Slow(gate), far)
    proxy = mpchannel.wrap(near)
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.append(proxy.answer()))
    thread.start()
    assert keeper.recv(20) == "asked"
    assert [(each["kind"], each["pid"]) for each in inspect()["calls"]] == [("remote", os.getpid())]
    keeper.post_message(42)
    thread.join(20)
    assert got == [42]
    assert inspect()["calls"] == []
    mpchannel.release(proxy)
    for each in (far, gate, keeper):
        each.close()


def tell_of_invocations() -> None:
    port = mpchannel.parent_port()
    assert port is not None
    thread = threading.Thread(target=mpchannel.ipc.parent.invoke, args=("how much",))
    thread.start()
    port.recv(20)
    port.post_message(inspect()["calls"])
    thread.join()
    port.post_message(inspect()["calls"])


def test_invocations_are_listed_until_they_are_answered() -> None:
    asked, answer = threading.Event(), threading.Event()

    def handle(event: Any) -> int:
        asked.set()
        assert answer.wait(20)
        return 7

    with mpchannel.Worker(tell_of_invocations) as worker:
        worker.ipc.handle("how much", handle)
        assert asked.wait(20)
        try:
            worker.post_message("look")
            (call,) = worker.recv(20)
        finally:
            answer.set()
        assert (call["kind"], call["name"], call["pid"]) == ("invoke", "how much", os.getpid())
        assert worker.recv(20) == []
