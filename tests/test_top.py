"""``python -m mpchannel top``: what is seen of a program from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mpchannel
from mpchannel.look import graph, top
from mpchannel.look.processes import End, Look, LookError, Process, Thread, hints, look_at

pytestmark = pytest.mark.once

HANG = 30
ROOT = Path(__file__).parent.parent


@contextmanager
def program(method: str) -> Iterator[list[int]]:
    """A running ``look_children``: the ids of its process and of its two children."""
    command = [sys.executable, "-m", "tests.look_children", method]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            children = [int(process.stdout.readline()) for _ in range(2)]
            assert process.stdout.readline() == "ready\n"
            yield [process.pid, *children]
        finally:
            process.kill()


def seen(pid: int, when: Callable[[Look], object]) -> Look:
    """A look at which something is so."""
    deadline = time.monotonic() + HANG
    while True:
        now = look_at(pid)
        if when(now):
            return now
        assert time.monotonic() < deadline, now
        time.sleep(0.01)


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mpchannel", "top", *map(str, arguments)],
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=2 * HANG,
        **options,
    )


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_who_holds_which_end_and_what_waits_there(method: str) -> None:
    with program(method) as (pid, first, second):
        now = seen(pid, lambda now: any("wait for each other" in hint for hint in now.hints))
        assert {pid, first, second} <= {process.pid for process in now.processes}
        channels = {}
        for end, other in now.channels():
            assert other is not None
            (one,), (two,) = ({pid for pid, _ in each.holders} for each in (end, other))
            unread = {one: end.unread, two: other.unread} if one != two else end.unread + other.unread
            channels[frozenset((one, two))] = unread
        assert channels.keys() == {frozenset((pid, first)), frozenset((pid, second)), frozenset((pid,))}
        assert channels[frozenset((pid, first))] == {pid: 0, first: 0}
        assert channels[frozenset((pid, second))] == {pid: 0, second: pytest.approx(278 * 65, rel=0.1)}
        assert 0 < channels[frozenset((pid,))] < 30
        (main,) = [process for process in now.processes if process.pid == pid]
        assert main.overflow >= 722 * 65
        assert [end.overflow for end in now.ends if end.overflow] == [main.overflow]
        (circle,) = [hint for hint in now.hints if "wait for each other" in hint]
        assert str(pid) in circle
        assert str(first) in circle
        assert str(second) not in circle
        (behind,) = [hint for hint in now.hints if "behind" in hint]
        assert re.match(rf"{second} \(.* is behind: \d\d,\d{{3}} bytes wait for it$", behind)


def test_a_stopped_process_can_be_looked_at() -> None:
    with program("spawn") as (pid, first, _):
        os.kill(pid, signal.SIGSTOP)
        now = seen(pid, lambda now: now.processes[0].state == "T")
        assert f"{pid} (" in "".join(hint for hint in now.hints if "is stopped" in hint)
        assert not any("wait for each other" in hint for hint in now.hints)
        assert any(process.pid == first for process in now.processes)
        os.kill(pid, signal.SIGCONT)
        seen(pid, lambda now: any("wait for each other" in hint for hint in now.hints))


def test_the_command_prints_draws_and_gives_json(tmp_path: Path) -> None:
    with program("spawn") as (pid, first, second):
        seen(pid, lambda now: any("wait for each other" in hint for hint in now.hints))
        ran = run(pid, "--once", "--interval", "0.1")
        assert (ran.returncode, ran.stderr) == (0, "")
        lines = ran.stdout.splitlines()
        assert [line.split()[0] for line in lines if line.endswith(" message")] == [str(pid), str(first)]
        (behind,) = [line for line in lines if f"{second} fd " in line]
        assert re.search(r" \d\d,\d{3} \+ \d+ KiB +\+0 B/s +0\.\d s$", behind)
        assert sum(line.startswith("! ") for line in lines) == 2

        ran = run(pid, "--json")
        assert (ran.returncode, ran.stderr) == (0, "")
        plain = json.loads(ran.stdout)
        assert plain.keys() == {"when", "processes", "ends", "hints"}
        assert len(plain["ends"]) == 6
        assert plain["ends"][0].keys() == {"inode", "peer", "unread", "held", "overflow", "holders"}

        for name in ("now.svg", "now.html"):
            ran = run(pid, "--graph", tmp_path / name)
            assert (ran.returncode, ran.stdout) == (0, "")
            drawn = (tmp_path / name).read_text()
            root = xml.etree.ElementTree.fromstring(drawn[drawn.index("<svg") : drawn.index("</svg>") + 6])
            texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
            for each in (pid, first, second):
                assert any(text and f"pid {each}, " in text for text in texts)
            assert texts.count("1 channel") == 2
            assert any(text and text.endswith(f" B wait for {second}") for text in texts)
            stuck = [each for each in root.iter("{http://www.w3.org/2000/svg}rect") if each.get("class") == "stuck"]
            assert len(stuck) == 2


@pytest.mark.parametrize("by", ["its end", "Ctrl-C"])
def test_live_until_the_program_ends_or_one_has_seen_enough(by: str) -> None:
    with program("spawn") as (pid, *_):
        script = "import sys; from mpchannel.__main__ import main; print('imported', flush=True); sys.exit(main())"
        viewer = subprocess.Popen(
            [sys.executable, "-c", script, "top", str(pid), "--interval", "0.05"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with viewer:
            try:
                assert viewer.stdout is not None
                assert viewer.stdout.readline() == "imported\n"
                begin = look_at(viewer.pid).processes[0].cpu
                seen(viewer.pid, lambda now: now.processes[0].cpu > begin + 0.5)  # rich is imported, it is at work
                if by == "Ctrl-C":
                    viewer.send_signal(signal.SIGINT)
                else:
                    os.kill(pid, signal.SIGKILL)
                output, errors = viewer.communicate(timeout=HANG)
            finally:
                viewer.kill()
        assert (viewer.returncode, errors) == (0, "")
        assert "held by" in output
        assert (f"process {pid} has ended" in output) == (by == "its end")


def test_live_without_rich_says_what_to_install() -> None:
    blocked = "import sys; sys.modules['rich'] = None; from mpchannel.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", blocked, "top", str(os.getpid())]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "error: the live view needs rich: pip install 'mpchannel[top]'; or use --once\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["4194305", "--once"], "there is no process 4194305"),
        (["1", "--once", "--interval", "0"], "--interval must be between"),
        (["1", "--graph", "a.png"], r"\.svg or \.html"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str) -> None:
    ran = run(*arguments)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch(rf"error: .*{words}.*\n", ran.stderr)


@pytest.mark.skipif(os.geteuid() != 0, reason="to become another user takes root")
def test_only_the_same_user_can_look() -> None:
    script = f"""
import os, sys
from mpchannel.look.processes import LookError, look_at
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    look_at({os.getpid()})
except LookError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=HANG)
    assert ran.stdout == f"process {os.getpid()} belongs to another user; only the same user (or root) can look at it\n"


# By hand: who waits for whom


def process(pid: int, *waits: str, on: tuple[int, ...] = (), state: str = "S") -> Process:
    threads = [
        Thread(pid + place, "thread", each, list(on) if each == "message" else []) for place, each in enumerate(waits)
    ]
    return Process(pid, 1, "python", state, 1.0, 0.1, 1 << 20, 0, threads)


def ends(*channels: tuple[int, int], unread: int = 0) -> list[End]:
    """Channel number n, between two processes: the ends 2n and 2n + 1."""
    return [
        End(2 * number + side, 2 * number + 1 - side, unread * side, 0, 0, [(pids[side], 3)])
        for number, pids in enumerate(channels)
        for side in (0, 1)
    ]


def told(*processes: Process, between: list[End]) -> list[str]:
    return hints(Look(0.0, list(processes), between, []))


def test_a_circle_of_three_is_told_and_who_only_waits_for_it_is_in_it() -> None:
    between = ends((10, 20), (20, 30), (30, 10), (10, 40))
    circle = (
        process(10, "message", on=(5,)),  # for 30
        process(20, "message", "thread", on=(1,)),  # for 10
        process(30, "message", on=(3,)),  # for 20
    )
    (hint,) = told(*circle, between=between)
    assert re.fullmatch(r"10 \(python\) and 20 \(python\) and 30 \(python\) wait for each other.*", hint)
    assert told(*circle, process(40, "something else"), between=between) == [hint]


@pytest.mark.parametrize(
    "other",
    [
        process(20, ""),  # at work
        process(20, "message", "", on=(1,)),  # another thread is
        process(20, "something else"),  # a timer, a file, a process
        process(20, "thread"),
    ],
)
def test_who_waits_for_somebody_at_work_is_not_stuck(other: Process) -> None:
    assert told(process(10, "message", on=(0,)), other, between=ends((10, 20))) == []


def test_a_message_under_way_ends_the_wait() -> None:
    two = process(10, "message", on=(0,)), process(20, "message", on=(1,))
    assert len(told(*two, between=ends((10, 20)))) == 1
    assert told(*two, between=ends((10, 20), unread=5)) == []


def test_whoever_waits_for_another_program_may_yet_be_told() -> None:
    waiting = process(10, "message", on=(7,))
    assert told(waiting, between=[End(7, 8, 0, 0, 0, [(10, 3)])]) == []
    assert told(waiting, between=[End(7, None, 0, 0, 0, [(10, 3)])]) == []


def test_a_process_that_waits_for_itself_is_told() -> None:
    (hint,) = told(process(10, "message", on=(0,)), between=ends((10, 10)))
    assert hint == "10 (python) waits for a message that only it could post itself"


def test_rates_and_ages_come_from_several_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter(
        [
            Look(when, [process(10, "")], [End(0, 1, unread, 0, 0, [(10, 3)]), End(1, 0, 0, 0, 0, [(10, 4)])], [])
            for when, unread in ((1.0, 0), (2.0, 300), (4.0, 100), (5.0, 0))
        ]
    )
    monkeypatch.setattr(top, "look_at", lambda pid: next(looks))
    history = top.History()
    history.look(10)
    assert history.growth([0, 1]) is None
    assert history.unread_for([0]) is None
    history.look(10)
    assert history.growth([0, 1]) == 300
    assert history.unread_for([0, 1]) == 0
    history.look(10)
    assert history.growth([0, 1]) == -100
    assert history.unread_for([0]) == 2
    assert history.cpu(10) == 0
    history.look(10)
    assert history.unread_for([0]) is None


def test_ourselves() -> None:
    port1, port2 = mpchannel.MessageChannel()
    port1.post_message("x" * 1000)
    now = look_at(os.getpid())
    (end,) = [end for end in now.ends if (os.getpid(), port2.fileno()) in end.holders]
    assert end.unread > 1000
    port1.close()
    (end,) = [end for end in look_at(os.getpid()).ends if (os.getpid(), port2.fileno()) in end.holders]
    assert end.peer is None
    port2.close()
    assert "<svg" in graph.page(now)
    with pytest.raises(LookError):
        look_at(0)
