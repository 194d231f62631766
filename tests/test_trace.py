"""``mpchannel.trace``, ``MPCHANNEL_TRACE`` and ``python -m mpchannel trace``."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import mpchannel
from mpchannel._endpoint import Endpoint
from mpchannel.port import MessagePort

from . import trace_children
from .children import running

HANG = 30
ROOT = Path(__file__).parent.parent


def events(path: Path) -> list[dict[str, Any]]:
    """The events of a trace, each of the shape that the format asks for."""
    content = json.loads(path.read_text())
    assert content["displayTimeUnit"] == "ms"
    assert not path.with_name(path.name + ".part").exists()
    found: list[dict[str, Any]] = content["traceEvents"]
    for event in found:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
            continue
        assert isinstance(event["ts"], float)
        match event["ph"]:
            case "X":
                assert event["dur"] > 0
            case "s":
                assert event["id"] > 0
            case "f":
                assert event["bp"] == "e"
            case "i":
                assert event["s"] == "t"
            case other:
                pytest.fail(f"unknown phase {other}")
    return found


def arrows(found: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of slices: the post, and where its message was taken. Each arrow begins and ends inside of a slice."""
    begins = {each["id"]: each for each in found if each["ph"] == "s"}
    ends = {each["id"]: each for each in found if each["ph"] == "f"}
    assert begins.keys() == ends.keys()
    pairs = []
    for number, begin in begins.items():
        end = ends[number]
        assert begin["ts"] <= end["ts"]
        pair = []
        for spot, names in ((begin, ("post",)), (end, ("receive", "dispatch"))):
            (inside,) = [
                each
                for each in found
                if each["name"] in names
                and (each["pid"], each["tid"]) == (spot["pid"], spot["tid"])
                and each["ts"] <= spot["ts"] < each["ts"] + each["dur"]
            ]
            pair.append(inside)
        pairs.append((pair[0], pair[1]))
    return pairs


def count(found: list[dict[str, Any]], name: str) -> int:
    return sum(each["name"] == name and each["ph"] != "s" and each["ph"] != "f" for each in found)


def test_posts_and_takes_of_two_processes_are_connected(context: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with mpchannel.trace(path):
        near, far = mpchannel.MessageChannel()
        process = context.Process(target=trace_children.double, args=(far,), name="doubler")
        process.start()
        for number in range(5):
            near.post_message(number)
        assert [near.recv(HANG) for _ in range(5)] == [0, 2, 4, 6, 8]
        near.close()
        process.join(HANG)
    found = events(path)
    pairs = arrows(found)
    assert len(pairs) == 10
    here, there = os.getpid(), process.pid
    assert Counter((post["pid"], take["pid"]) for post, take in pairs) == {(here, there): 5, (there, here): 5}
    assert all(post["args"]["bytes"] > 0 and post["args"]["accepted"] for post, _ in pairs)
    names = {each["pid"]: each["args"]["name"] for each in found if each["name"] == "process_name"}
    assert names == {here: f"MainProcess, pid {here}", there: f"doubler, pid {there}"}
    assert count(found, "channel") == count(found, "transfer") == count(found, "close") == 1
    (closed,) = [each for each in found if each["name"] == "closed by the other end"]
    assert (closed["pid"], closed["args"]["reason"]) == (there, "closed")


def test_a_port_that_moves_keeps_its_arrows(tmp_path: Path) -> None:
    """Three processes under spawn: messages are posted here, and taken wherever the other end is by then."""
    path = tmp_path / "run.json"
    context = mpchannel.get_context("spawn")
    with mpchannel.trace(path):
        control, far_control = mpchannel.MessageChannel()
        relay, far_relay = mpchannel.MessageChannel()
        ours, moving = mpchannel.MessageChannel()
        with (
            running(context.Process(target=trace_children.pass_on, args=(far_control,))) as first,
            running(context.Process(target=trace_children.answer_at, args=(far_relay,))) as second,
        ):
            ours.post_message(1)
            control.post_message("two ports", [moving, relay])
            assert ours.recv(HANG) == 2
            ours.post_message(2)
            assert ours.recv(HANG) == 3
            ours.close()
            control.close()
    found = events(path)
    pairs = arrows(found)
    here = os.getpid()
    assert Counter((post["pid"], take["pid"]) for post, take in pairs) == {
        (here, first.pid): 1,  # the two ports
        (first.pid, second.pid): 1,  # one of them, onward
        (here, second.pid): 2,
        (second.pid, here): 2,
    }
    assert {take["name"] for _, take in pairs if take["pid"] == second.pid} == {"receive", "dispatch"}
    moves = Counter((each["pid"], each["args"]["to"]) for each in found if each["name"] == "transfer")
    assert moves == {(here, first.pid): 3, (here, second.pid): 1, (first.pid, second.pid): 1}


def test_what_a_killed_process_did_is_in_it(context: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with mpchannel.trace(path):
        near, far = mpchannel.MessageChannel()
        with running(context.Process(target=trace_children.post_and_die, args=(far,)), -signal.SIGKILL) as process:
            assert near.recv(HANG) == "the last word"
            closed = near.wait_closed(HANG)
    assert closed is not None
    ((post, _),) = arrows(found := events(path))
    assert post["pid"] == process.pid
    (told,) = [each for each in found if each["name"] == "closed by the other end"]
    assert told["args"]["reason"] == "died"
    assert told["args"]["by"] == process.pid


def by_recv(port: Any) -> None:
    assert port.recv(HANG) == "x"


def by_receive(port: Any) -> None:
    assert port.receive(HANG).data == "x"


def by_iteration(port: Any) -> None:
    assert next(port) == "x"


def by_taking_one(port: Any) -> None:
    assert mpchannel.receive_message_on_port(port) is not None


def as_bytes(port: Any) -> None:
    assert port.recv_bytes()


def by_arecv(port: Any) -> None:
    assert asyncio.run(port.arecv()) == "x"


def by_listener(port: Any) -> None:
    done = threading.Event()
    port.onmessage = lambda event: done.set()
    assert done.wait(HANG)


def by_listener_on_a_loop(port: Any) -> None:
    async def main() -> None:
        done = asyncio.Event()
        port.onmessage = lambda event: done.set()
        await asyncio.wait_for(done.wait(), HANG)
        port.onmessage = None

    asyncio.run(main())


@pytest.mark.parametrize(
    "take",
    [
        by_recv,
        by_receive,
        by_iteration,
        by_taking_one,
        as_bytes,
        by_arecv,
        by_listener,
        by_listener_on_a_loop,
    ],
)
@pytest.mark.parametrize("post", ["post_message", "send"])
def test_every_way_to_post_and_to_take_is_recorded_once(post: str, take: Any, tmp_path: Path) -> None:
    with mpchannel.trace(tmp_path / "run.json"):
        port1, port2 = mpchannel.MessageChannel()
        getattr(port1, post)("x")
        take(port2)
        port1.close()
        port2.close()
    found = events(tmp_path / "run.json")
    assert len(arrows(found)) == 1
    assert count(found, "post") == 1
    assert count(found, "receive") + count(found, "dispatch") == 1


class Unloadable:
    def __reduce__(self) -> Any:
        return trace_children.refuse, ()


def test_messages_that_never_arrive_take_no_arrow_from_others(tmp_path: Path) -> None:
    with mpchannel.trace(tmp_path / "run.json"):
        port1, port2 = mpchannel.MessageChannel()
        with pytest.raises(mpchannel.DataCloneError):
            port1.post_message(threading.Lock())
        port1.post_message(Unloadable())
        port1.post_message("x")
        with pytest.raises(mpchannel.MessageError):
            port2.recv(HANG)
        assert port2.recv(HANG) == "x"
        with pytest.raises(TimeoutError):
            port2.recv(0)
        port2.close()
        assert not port1.post_message("to nobody")
    found = events(tmp_path / "run.json")
    pairs = arrows(found)
    assert len(pairs) == 2
    assert pairs[1][0]["ts"] > pairs[0][0]["ts"]
    assert [each["args"]["accepted"] for each in found if each["name"] == "post"] == [False, True, True, False]
    assert count(found, "receive") == 3


def test_messages_posted_before_the_trace_get_no_arrow(tmp_path: Path) -> None:
    port1, port2 = mpchannel.MessageChannel()
    port1.post_message("before")
    with mpchannel.trace(tmp_path / "run.json"):
        assert port2.recv() == "before"
        port1.post_message("meanwhile")
        assert port2.recv() == "meanwhile"
    ((post, take),) = arrows(events(tmp_path / "run.json"))
    assert post["ts"] < take["ts"]
    port1.close()
    port2.close()


def test_nothing_of_it_is_left_behind(tmp_path: Path) -> None:
    before = {(owner, name): value for owner in (MessagePort, Endpoint) for name, value in vars(owner).items()}

    def fails() -> None:
        with mpchannel.trace(tmp_path / "run.json"):
            assert vars(MessagePort)["recv"] is not before[MessagePort, "recv"]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert {(owner, name): value for owner in (MessagePort, Endpoint) for name, value in vars(owner).items()} == before
    assert "MPCHANNEL_TRACE_SPOOL" not in os.environ
    assert os.listdir(tmp_path) == ["run.json"]
    ran = subprocess.run(
        [sys.executable, "-c", "import sys, mpchannel; sys.exit('mpchannel._trace' in sys.modules)"], timeout=HANG
    )
    assert ran.returncode == 0


def test_bad_input_is_told_before_anything_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no such folder"), mpchannel.trace(tmp_path / "no such folder" / "run.json"):
        pytest.fail("must not be reached")
    with mpchannel.trace(tmp_path / "run.json"):
        with pytest.raises(RuntimeError, match=r"being recorded already, into .*run\.json\.part"):
            mpchannel.trace(tmp_path / "other.json").__enter__()
        port1, port2 = mpchannel.MessageChannel()
        port1.post_message("x")
        assert port2.recv() == "x"
        port1.close()
        port2.close()
    assert len(arrows(events(tmp_path / "run.json"))) == 1
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_whole_program_by_its_environment(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.trace_children"],
        cwd=ROOT,
        env=os.environ | {"MPCHANNEL_TRACE": str(tmp_path / "run.json")},
        capture_output=True,
        text=True,
        timeout=2 * HANG,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    found = events(tmp_path / "run.json")
    assert len(arrows(found)) == 2
    assert len({each["pid"] for each in found}) == 2
    assert count(found, "closed by the other end") == 1  # in the child, which ends when the program does


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mpchannel", "trace", *arguments],
        env=os.environ | {"COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=2 * HANG,
    )


def test_the_command_tells_and_draws_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    with mpchannel.trace(path):
        port1, port2 = mpchannel.MessageChannel()
        for _ in range(3):
            port1.post_message("x")
        by_listener(port2)
        port1.post_message("y")
        assert port1.buffered_amount >= 0
        port1.close()
        port2.wait_closed(HANG)
        unfinished = path.with_name("run.json.part").read_text()
    for name, content in (("run.json", path.read_text()), ("killed.json.part", unfinished[:-40])):
        (tmp_path / name).write_text(content)
        picture = tmp_path / f"{name}.png"
        ran = command(str(tmp_path / name), "--picture", str(picture))
        assert (ran.returncode, ran.stderr) == (0, "")
        (line,) = [line.split() for line in ran.stdout.splitlines() if line.endswith("us") and "/1 " in line]
        assert line[1:5] == [str(os.getpid()), "4", "4", str(4 * len(pickle.dumps("x", 5)))]
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_says_what_is_no_trace(tmp_path: Path) -> None:
    for name, content in (("empty", ""), ("other", '{"events": []}'), ("list", '"a text"')):
        (tmp_path / name).write_text(content)
        ran = command(str(tmp_path / name))
        assert (ran.returncode, ran.stdout) == (1, "")
        assert "is not a trace" in ran.stderr
    ran = command(str(tmp_path / "missing"))
    assert (ran.returncode, ran.stdout) == (1, "")
    assert "missing" in ran.stderr
