"""``python -m mpchannel top``: what a running program's channels do, seen from outside."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mpchannel
from mpchannel import __main__
from mpchannel.top import command, graph, snapshot
from mpchannel.top.snapshot import Snapshot, Watch, ways


@contextmanager
def program(how: str, method: str = "fork") -> Iterator[dict[str, Any]]:
    """The program of ``top_children`` once it says that it is ready: its pid and its children's."""
    started = subprocess.Popen(
        [sys.executable, "-m", "tests.top_children", how, method],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert started.stdin is not None
    assert started.stdout is not None
    about: dict[str, Any] = {}
    try:
        about = json.loads(started.stdout.readline())
        yield about
    finally:
        for pid in about.get("children", ()):
            try:
                os.kill(pid, signal.SIGKILL)  # one that is stopped, too
            except ProcessLookupError:
                pass
        started.stdin.close()
        started.wait(30)
        started.stdout.close()


def until(watch: Watch, right: Callable[[Snapshot], bool]) -> Snapshot:
    """The first look that is as it should be."""
    deadline = time.monotonic() + 30
    while not right(now := watch.look()):
        assert time.monotonic() < deadline, now
        time.sleep(0.02)
    return now


def between(now: Snapshot, one: int, other: int) -> dict[int, snapshot.Queue]:
    """What waits in the channel of two processes, by whom it is for."""
    return {to: queue for channel, queue, to, by in ways(now) if {to, by} == {one, other} and to is not None}


def test_who_holds_which_end_and_what_waits(start_method: str) -> None:
    with program("busy", start_method) as about:
        now = Watch(about["pid"]).look()
        first, second = about["children"]
        assert {about["pid"], first, second} <= set(now.processes)
        queues = between(now, about["pid"], first)
        assert (queues[first].messages, queues[first].exact, queues[first].bytes) == (3, True, 15)
        assert queues[about["pid"]].total == 0
        assert not any(queue.total for queue in between(now, about["pid"], second).values())
        (channel,) = (each for each in now.channels if set(each.pids) == {about["pid"], first})
        for inode, holders in zip(channel.inodes, channel.holders, strict=True):
            for pid, number in holders:
                assert os.readlink(f"/proc/{pid}/fd/{number}") == f"socket:[{inode}]"
        assert now.hints == []


def test_two_that_wait_for_each_other_are_told_of(start_method: str) -> None:
    with program("deadlock", start_method) as about:
        first, second = about["children"]
        now = until(Watch(about["pid"]), lambda now: bool(now.hints))
        pair = sorted((about["pid"], first))
        assert now.hints == [f"{pair[0]} and {pair[1]} wait for each other: each sleeps until the other posts"]
        assert now.processes[first].waits_for == [about["pid"]]
        assert now.processes[second].waits_for == [about["pid"]]  # and that is no deadlock


def test_a_server_without_work_is_no_deadlock() -> None:
    with program("idle") as about:
        now = until(Watch(about["pid"]), lambda now: all(now.processes[pid].waits_for for pid in about["children"]))
        assert now.processes[about["pid"]].waits_for == []
        assert now.hints == []


def test_one_that_is_stopped_can_be_looked_at() -> None:
    with program("busy") as about:
        first = about["children"][0]
        os.kill(first, signal.SIGSTOP)
        now = until(Watch(about["pid"]), lambda now: now.processes[first].state == "T")
        assert now.hints == [f"{first} is stopped (SIGSTOP, or a debugger); 15 bytes wait for it"]


def test_lifelines_of_workers_are_not_in_the_way() -> None:
    with mpchannel.Worker("signal:pause") as worker:
        now = until(Watch(os.getpid()), lambda now: any(each.lifeline for each in now.channels))
        (lifeline,) = (each for each in now.channels if each.lifeline)
        assert set(lifeline.pids) == {os.getpid(), worker.pid}
        number = f"{lifeline.inodes[0]}-{lifeline.inodes[1]}"
        assert number not in command.as_text(now)
        assert any(set(each.pids) == {os.getpid(), worker.pid} and not each.lifeline for each in now.channels)


def test_an_overflow_file_is_told_of() -> None:
    with program("flood") as about:
        now = Watch(about["pid"]).look()
        queue = between(now, about["pid"], about["children"][0])[about["children"][0]]
        assert queue.file > 500_000
        assert not queue.exact
        assert "MiB" in graph.count(queue) or "KiB" in graph.count(queue)


def test_rates_are_those_between_two_looks(channel: Any) -> None:
    near, _far = channel
    watch = Watch(os.getpid())
    before = watch.look()
    for _ in range(10):
        near.post_message("x")
    now = watch.look()
    inode = os.fstat(near.fileno()).st_ino
    (mine,) = (each for each in now.channels if inode in each.inodes)
    grown = mine.queues[1 - mine.inodes.index(inode)]
    assert grown.rate == round(grown.bytes / (now.time - before.time), 1) > 0
    assert mine.seen == now.time - before.time
    assert now.processes[os.getpid()].cpu_percent is not None


def test_looking_leaves_nothing_and_disturbs_nothing(channel: Any) -> None:
    near, far = channel
    near.post_message("there")
    watch = Watch(os.getpid())
    for _ in range(5):
        watch.look()
    assert far.recv(10) == "there"


# The command


def run(*arguments: str) -> int:
    return __main__.main(["top", *arguments])


def test_once_prints_tables(capsys: pytest.CaptureFixture[str]) -> None:
    with program("deadlock") as about:
        until(Watch(about["pid"]), lambda now: bool(now.hints))
        assert run(str(about["pid"]), "--once") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["pid", "process", "state", "age"]
    assert any(line.startswith(f"{about['children'][0]} ") for line in lines)
    assert any(f"{about['pid']}:" in line and f"{about['children'][0]}:" in line for line in lines)
    assert lines[-1].startswith("! ")


def test_json_is_what_was_seen(capsys: pytest.CaptureFixture[str]) -> None:
    with program("busy") as about:
        assert run(str(about["pid"]), "--once", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["root"] == about["pid"]
    assert {each["pid"] for each in said["processes"]} >= {about["pid"], *about["children"]}
    waiting = [end["waiting"]["messages"] for each in said["channels"] for end in each["ends"]]
    assert sorted(waiting)[-2:] == [0, 3]


@pytest.mark.parametrize("kind", ["svg", "html"])
def test_the_graph_has_each_process_and_what_waits(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"picture.{kind}"
    with program("busy") as about:
        assert run(str(about["pid"]), "--graph", str(file)) == 0
    text = file.read_text()
    assert text.startswith("<!doctype html>" if kind == "html" else "<svg ")
    drawn = ElementTree.fromstring(text[text.index("<svg ") : text.index("</svg>") + 6])
    texts = [each.text or "" for each in drawn.iter() if each.tag.endswith("text")]
    for pid in (about["pid"], *about["children"]):
        assert any(each.startswith(f"{pid} ") for each in texts)
    assert f"{about['pid']} → {about['children'][0]}: 3 msg, 15 B" in texts
    assert len([each for each in drawn.iter() if each.tag.endswith("rect")]) == 3


def test_the_live_view_shows_the_same(channel: Any) -> None:
    console = pytest.importorskip("rich.console")
    channel[0].post_message("x")
    now = Watch(os.getpid()).look()
    screen = console.Console(width=160, record=True, file=io.StringIO())
    screen.print(command.view(now))
    shown = screen.export_text()
    assert str(os.getpid()) in shown
    assert "1 msg, " in shown


def test_the_live_view_names_its_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.live", None)
    assert run(str(os.getpid())) == 1
    assert "pip install 'mpchannel[top]'" in capsys.readouterr().err
    assert run(str(os.getpid()), "--once") == 0


def test_who_may_not_look_is_told_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    listdir = os.listdir

    def refuse(path: str) -> list[str]:
        if path == f"/proc/{os.getpid()}/fd":
            raise PermissionError(13, "Permission denied", path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert run(str(os.getpid()), "--once") == 1
    assert "is not yours to look at: only the same user can" in capsys.readouterr().err


def test_wrong_usage_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert run(str(ended.pid), "--once") == 1
    assert f"there is no process {ended.pid}" in capsys.readouterr().err
    assert run(str(os.getpid()), "--graph", "picture.png") == 1
    assert ".svg or .html" in capsys.readouterr().err
    assert run(str(os.getpid()), "--once", "--interval", "0") == 1
    assert "--interval" in capsys.readouterr().err
