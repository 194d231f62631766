"""``python -m mpchannel demo`` as somebody who tries it: what it prints is true, and it leaves nothing behind."""

from __future__ import annotations

import os
import pty
import random
import re
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest

from mpchannel import MessageChannel, SharedBuffer
from mpchannel.demo import frames, offload
from mpchannel.demo.search import Found, Progress, search, text_files

pytestmark = pytest.mark.once

COMMAND = (sys.executable, "-m", "mpchannel", "demo")
LINES = 60  # of each of the FILES
FILES = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """FILES text files in two folders. Every third line holds "needle", every one in the first file "rare" as well.

    Beside them is what is not searched: a binary file, a hidden folder and somebody else's packages.
    """
    root = tmp_path / "searched"
    (root / "sub").mkdir(parents=True)
    for number in range(FILES):
        words = "needle rare" if number == 0 else "needle"
        lines = [f"{words} {line}" if line % 3 == 0 else f"hay {line} \u00e9" for line in range(LINES)]
        (root / ("sub" if number % 2 else ".") / f"{number}.txt").write_text("\n".join(lines) + "\n", "utf-8")
    (root / "binary").write_bytes(b"needle\n\0needle\n")
    for name in (".hidden", "site-packages"):
        (root / name).mkdir()
        (root / name / "left_out.txt").write_text("needle\n")
    return root


NEEDLES = FILES * LINES // 3


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """An empty folder to run in."""
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def demo(elsewhere: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=elsewhere,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=100,
    )


def rows(output: str) -> dict[str, list[str]]:
    """The lines of the tables by their first cell."""
    cells = [re.split(r" {2,}", line.rstrip()) for line in output.splitlines()]
    return {first: others for first, *others in cells}


def test_search_tells_file_line_and_text_as_it_goes(tmp_path: Path) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    Path(one).write_bytes(b"no\r\nneedle \xff\r\n\n")
    Path(two).write_bytes(b"the needle")
    assert list(search("^needle|e$", [one, str(tmp_path / "missing"), two])) == [
        Found(one, 2, "needle \ufffd"),
        Progress(1, 3, 15),
        Found(two, 1, "the needle"),
        Progress(2, 4, 25),
    ]
    assert list(text_files(str(tmp_path))) == [one, two]


def test_channel_tells_what_happened_where(elsewhere: Path, start_method: str) -> None:
    ran = demo(elsewhere, "channel", "--start-method", start_method)
    assert (ran.returncode, ran.stderr) == (0, "")
    started = re.search(r"^main    process (\d+): started a worker, process (\d+)$", ran.stdout, re.MULTILINE)
    assert started
    main, worker = started.groups()
    assert main != worker
    lines = ran.stdout.splitlines()
    assert f"main    received, on channel 'port': a port made in process {worker}" in lines
    assert "main    its first message was posted before it moved: {'answer': 42}" in lines
    assert f"worker  heard: thanks, from process {main}" in lines
    assert f"main    the channel is over: CloseEvent(reason='closed', was_clean=True, pid={worker})" in lines


def test_worlds_reaches_the_main_world_through_the_preload(elsewhere: Path, start_method: str) -> None:
    ran = demo(elsewhere, "worlds", "--start-method", start_method)
    assert (ran.returncode, ran.stderr) == (0, "")
    worker = re.search(r"with a preload function, process (\d+)$", ran.stdout, re.MULTILINE)
    assert worker
    lines = ran.stdout.splitlines()
    assert f"preload     process {worker[1]}: passed the port on to the window" in lines
    assert f"main world  process {worker[1]}: got 'hello', answered 'HELLO'" in lines
    assert f"main world  process {worker[1]}: got 'world', answered 'WORLD'" in lines


def test_worker_prints_the_true_figures(elsewhere: Path, folder: Path, start_method: str) -> None:
    size = sum(path.stat().st_size for path in folder.rglob("*.txt") if path.name != "left_out.txt")
    ran = demo(
        elsewhere,
        *("worker", "--path", str(folder), "--start-method", start_method),
        *("--pattern", "needle", "--pattern", "rare", "--pattern", "\u00e9$"),
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    table = rows(ran.stdout)
    lines = FILES * LINES
    for pattern, matches in (("needle", NEEDLES), ("rare", LINES // 3), ("\u00e9$", lines - NEEDLES)):
        files, read, found, megabytes, _, latency, messages = table[pattern]
        assert (files, read, found) == (str(FILES), str(lines), str(matches))
        assert messages == str(matches + FILES)  # one of progress for each file
        assert megabytes == f"{size / 1e6:.1f}"
        assert float(latency.removesuffix(" ms")) > 0
    assert table["total"][:3] == [str(3 * FILES), f"{3 * lines:,}", str(LINES // 3 + lines)]


def test_worker_tells_who_did_what_and_why_it_closed(elsewhere: Path, folder: Path) -> None:
    ran = demo(elsewhere, "worker", "--path", str(folder), "--pattern", "needle")
    assert (ran.returncode, ran.stderr) == (0, "")
    main, app, worker, other = (
        re.search(rf"^{name} +process (\d+)", ran.stdout, re.MULTILINE) for name in ("main", "app", "worker", "other")
    )
    assert main
    assert app
    assert worker
    assert other
    assert len({main[1], app[1], worker[1], other[1]}) == 4
    assert "made one channel, and holds 0 of its 2 ends" in ran.stdout
    assert "asked for one too; refused: True" in ran.stdout
    table = rows(ran.stdout)
    assert table["port for the reply to needle"] == ["closed", worker[1]]
    assert "exit codes: app 0, worker 0" in ran.stdout


def test_without_a_name_it_is_worker(elsewhere: Path, folder: Path) -> None:
    ran = demo(elsewhere, "--path", str(folder))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert len([name for name in rows(ran.stdout) if name.startswith("port for the reply to ")]) == 5
    tables = ran.stdout[ran.stdout.index("\nsearch   ") :]
    assert all(len(line) <= 80 for line in tables.splitlines())


def test_a_pattern_that_matches_nothing_is_no_failure(elsewhere: Path, folder: Path) -> None:
    ran = demo(elsewhere, "--path", str(folder), "--pattern", "no such thing")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert rows(ran.stdout)["total"][2] == "0"


def test_stream_finds_the_same_as_a_plain_search_although_a_worker_is_killed(
    elsewhere: Path, folder: Path, start_method: str
) -> None:
    ran = demo(
        elsewhere,
        *("stream", "--path", str(folder), "--start-method", start_method),
        *("--pattern", "needle", "--streams", "8"),
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    table = rows(ran.stdout)
    assert table["streams"] == table["completed"] == ["8"]
    assert table["matches"] == table["matches of the plain search"] == [str(NEEDLES)]
    assert "equal, stream by stream: yes" in ran.stdout
    assert "killed worker 1" in ran.stdout
    assert int(table["interrupted"][0]) >= 1
    assert table["interrupted"] == table["taken over and completed"]
    *_, closes, code = table["worker 1"]
    assert f"{table['interrupted'][0]} died" in closes
    assert code == "-9"
    for name in ("worker 2", "worker 3"):
        assert table[name][-1] == "0"
        assert "died" not in table[name][-2]


def test_stream_kills_nobody_where_there_is_no_half_way(elsewhere: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "file").write_text("needle\n")
    ran = demo(elsewhere, "stream", "--path", str(tmp_path / "one"), "--pattern", "needle")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "killed" not in ran.stdout
    assert rows(ran.stdout)["matches"] == ["1"]


MEGABYTES = 12  # of what ``demo offload`` has to digest, one for each file


@pytest.fixture
def heavy(tmp_path: Path) -> Path:
    """Files that take long enough to digest for a worker to be killed at it.

    Beside them is what is left out: links, a hidden folder, what Python compiled.
    """
    root = tmp_path / "digested"
    (root / "sub").mkdir(parents=True)
    chance = random.Random(0)
    for number in range(MEGABYTES):
        data = chance.randbytes(1_000_000) if number % 4 == 0 else chance.randbytes(500_000).hex().encode()
        (root / ("sub" if number % 2 else ".") / f"{number}.data").write_bytes(data)
    (root / "link").symlink_to(root / "0.data")
    (root / "link_to_folder").symlink_to(root / "sub")
    for name in (".hidden", "__pycache__"):
        (root / name).mkdir()
        (root / name / "left_out").write_bytes(b"x")
    return root


def check_offload(output: str, heavy: Path, megabytes: int = MEGABYTES) -> None:
    """What it says of its end is true."""
    assert f"{heavy}: {megabytes} files, {megabytes}.0 MB" in output
    killed = re.search(r"^killed: process (\d+), when (\d+)% of all bytes were done", output, re.MULTILINE)
    redone = re.search(r"^redone: call (\d+), by process (\d+)$", output, re.MULTILINE)
    workers = re.search(r"^workers that ran: \d+, processes (.*)$", output, re.MULTILINE)
    assert killed
    assert redone
    assert workers
    assert killed[1] != redone[2]
    assert int(killed[2]) >= 50
    assert {killed[1], redone[2]} <= set(workers[1].split(", "))
    table = rows(output[output.index("\ncall ") :])
    calls = {name.split()[0]: cells for name, cells in table.items() if re.match(r"\d+ ", name)}
    assert sum(int(cells[0]) for cells in calls.values()) == megabytes
    assert calls[redone[1]][-2:] == [redone[2], "2"]
    assert all(cells[-1] == "1" for number, cells in calls.items() if number != redone[1])
    assert table["total"][:2] == [str(megabytes), f"{megabytes}.0"]
    assert f"checked here, in one process: SHA-256 of {megabytes} files" in output
    assert output.splitlines()[-1] == "result right: True"


def test_offload_is_right_although_a_worker_is_killed(elsewhere: Path, heavy: Path, start_method: str) -> None:
    ran = demo(elsewhere, "offload", "--path", str(heavy), "--start-method", start_method)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "\x1b" not in ran.stdout
    check_offload(ran.stdout, heavy)


def test_offload_with_one_worker_has_a_fresh_one_after_it(elsewhere: Path, heavy: Path) -> None:
    ran = demo(elsewhere, "offload", "--path", str(heavy), "--workers", "1")
    assert (ran.returncode, ran.stderr) == (0, "")
    check_offload(ran.stdout, heavy)


def test_offload_draws_a_bar_for_each_call_on_a_terminal(elsewhere: Path, heavy: Path) -> None:
    for path in list(heavy.rglob("*.data")):
        for number in range(3):  # for some seconds, so that both workers are seen at work
            os.link(path, path.with_name(f"{path.stem}-{number}.data"))
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24"}
    command = [*COMMAND, "offload", "--path", str(heavy)]
    with subprocess.Popen(command, cwd=elsewhere, env=environment, stdout=theirs, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        parts = []
        try:
            while part := os.read(ours, 65536):
                parts.append(part)
        except OSError:
            pass  # the other end is closed, by all who had it
        os.close(ours)
        assert process.stderr is not None
        assert (process.wait(60), process.stderr.read()) == (0, b"")
    output = b"".join(parts).decode().replace("\r\n", "\n")
    row = r"\[[#.]{20}\] {0,2}\d+%  %s[^\n\x1b]*"
    two = row.replace("%s", r"call \d+, process \d+: [\d-]+\.data")
    total = row.replace("%s", r"\d+ of \d+ calls done, ")
    drawn_again = rf"\x1b\[2A\r{two}\n{two}\n{total}"
    assert re.search(drawn_again, output)
    _, *drawn = re.sub(r"\x1b\[\dA", "", output[: output.index("checked here")]).splitlines()
    assert max(map(len, drawn)) == 79
    check_offload(output, heavy, 4 * MEGABYTES)


def test_offload_finds_what_is_wrong(heavy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files, left = offload.take(str(heavy))
    assert (len(files), left) == (MEGABYTES, 0)
    calls = offload.make_calls(files, 4)
    assert [file for call in calls for file in call.files] == files
    for call in calls:
        call.outcome = offload.work([file.path for file in call.files], call.size)
    main = offload.Main(calls)
    assert offload.check(calls, main) == []
    path = Path(calls[1].files[0].path)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert offload.check(calls, main) == [f"{path}: not what is found here"]
    assert not offload.print_end(main, [])  # nobody was killed


def test_offload_kills_another_one_after_a_kill_that_came_too_late(capfd: pytest.CaptureFixture[str]) -> None:
    (call,) = offload.make_calls([offload.File("file", offload.LEAST)], 1)
    main = offload.Main([call])
    main.reported(call, call.size // 2, "7 file")
    main.kill = offload.Kill(7, call, call.done, 0.5)
    answer: Future[offload.Outcome] = Future()
    answer.set_result(offload.Outcome(7, 1.0, []))
    main.ended(call, answer)
    assert (main.kill, main.redone) == (None, False)


def test_offload_takes_no_more_than_it_says(heavy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "MOST", 5_500_000)
    files, left = offload.take(str(heavy))
    assert (len(files), left) == (5, MEGABYTES - 5)


def test_offload_kills_nobody_where_there_is_no_half_way(elsewhere: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "file").write_text("few\n")
    (tmp_path / "one" / "none").write_text("")
    ran = demo(elsewhere, "offload", "--path", str(tmp_path / "one"))
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "nobody was killed: with less than 4 MB" in ran.stdout
    assert "killed process" not in ran.stdout
    assert ran.stdout.endswith("result right: True\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--path", "missing"], "not a folder: missing"),
        (["--path", "."], r"no files in \."),
        (["--workers", "0"], "--workers must be at least 1, not 0"),
    ],
    ids=["missing", "empty", "workers"],
)
def test_bad_input_of_offload_is_one_line(arguments: list[str], words: str, elsewhere: Path) -> None:
    ran = demo(elsewhere, "offload", *arguments)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch(rf"error: {words}\n", ran.stderr)


@pytest.mark.parametrize("name", ["worker", "stream"])
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--path", "missing"], "not a folder: missing"),
        (["--path", sys.executable], "not a folder"),
        (["--path", "."], r"no text files in \."),
        (["--pattern", "(unclosed"], r"not a regular expression: '\(unclosed'"),
        (["--streams", "0"], "--streams must be at least 1"),
    ],
    ids=["missing", "file", "empty", "regex", "streams"],
)
def test_bad_input_is_one_line_and_exit_code_1(name: str, arguments: list[str], words: str, elsewhere: Path) -> None:
    ran = demo(elsewhere, name, *arguments)
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert re.fullmatch(rf"error: .*{words}.*\n", ran.stderr)


def test_stream_takes_one_pattern_only(elsewhere: Path) -> None:
    ran = demo(elsewhere, "stream", "--pattern", "a", "--pattern", "b")
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", "error: demo stream takes one --pattern\n")


@contextmanager
def running(elsewhere: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A demo in a process group of its own, as a terminal would have it."""
    with subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=elsewhere,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # as it should be: nobody is left of the whole group


def read_until(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    assert any(word in line for line in iter(process.stdout.readline, "")), f"ended before it printed {word!r}"


ENDLESS = ("--pattern", "(a+)+$")
"""Takes for ever on a line of many a's and a b."""


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    (tmp_path / "endless").mkdir()
    (tmp_path / "endless" / "file").write_text("a" * 60 + "b\n")
    return tmp_path / "endless"


def test_ctrl_c_ends_worker_at_once_and_quietly(elsewhere: Path, endless: Path, start_method: str) -> None:
    with running(elsewhere, "worker", "--path", str(endless), *ENDLESS, "--start-method", start_method) as process:
        read_until(process, "worker  process")
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)  # the end of its output: all children are gone as well
        assert (process.returncode, errors) == (130, "\ninterrupted\n")


def test_ctrl_c_ends_stream_at_once_and_quietly(elsewhere: Path, start_method: str) -> None:
    stdlib = sysconfig.get_paths()["stdlib"]
    with running(elsewhere, "stream", "--path", stdlib, "--start-method", start_method) as process:
        read_until(process, "started worker 2")
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (130, "\ninterrupted\n")


def test_ctrl_c_ends_offload_at_once_and_quietly(elsewhere: Path, start_method: str) -> None:
    with running(elsewhere, "offload", "--start-method", start_method) as process:
        read_until(process, "0 of ")  # the first line of progress: workers are at work
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (130, "\ninterrupted\n")


FRAMES = 60


def test_frames_come_through_right_and_without_faults_once_warm(elsewhere: Path, start_method: str) -> None:
    process = demo(elsewhere, "frames", "--frames", str(FRAMES), "--plot", "at.svg", "--start-method", start_method)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stderr == ""
    table = rows(process.stdout)
    for role in ("camera", "filter", "checker"):
        _, came, rate, _, _, warm, *memory = table[role]
        assert came == str(FRAMES)
        assert float(rate) > 0
        assert float(warm) < 1
        assert all(0 < float(each) < 1000 for each in memory)
    assert process.stdout.endswith(f"{FRAMES} frames came, in order: yes; wrong: 0\n")
    assert f"over time: {elsewhere / 'at.svg'}\n" in process.stdout
    assert b"<svg" in (elsewhere / "at.svg").read_bytes()


def test_frames_finds_a_pixel_that_is_wrong() -> None:
    right, (port, _) = frames.make_check(), MessageChannel()
    meter = frames.Meter(port)
    pixels = SharedBuffer(frames.SIZE)
    frames.paint(pixels, frames.make_scene(), 300, meter)
    assert not right(frames.Frame(300, pixels), meter)  # it was not inverted
    frames.invert(pixels, meter)
    assert right(frames.Frame(300, pixels), meter)
    pixels[frames.SIZE - 1] ^= 1
    assert not right(frames.Frame(300, pixels), meter)


def test_frames_without_the_filter_end_and_say_why(elsewhere: Path) -> None:
    with running(elsewhere, "frames", "--frames", "1000000") as process:
        assert process.stdout is not None
        told = ""
        while not told.startswith("processes"):
            told = process.stdout.readline()
        read_until(process, "frames")  # the first line of progress
        killed = re.search(r"filter (\d+)", told)
        assert killed is not None
        os.kill(int(killed[1]), signal.SIGKILL)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (1, "")
        assert re.search(rf"filter, process {killed[1]}: .* died", output)
        assert "in order: NO" in output


def test_frames_draws_nothing_without_matplotlib(elsewhere: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; from mpchannel.__main__ import main; "
        "sys.exit(main(['demo', 'frames', '--frames', '2']))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=elsewhere, capture_output=True, text=True, timeout=100)
    assert (process.returncode, process.stderr) == (0, "")
    assert "no plot, as Matplotlib is not installed" in process.stdout
    assert os.listdir(elsewhere) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--frames", "0"), "--frames must be at least 1, not 0"),
        (("--plot", "missing/plot.png"), "--plot: cannot write to folder"),
        (("--plot", "plot.tiger"), "--plot: .tiger is no kind of picture that Matplotlib writes: "),
    ],
)
def test_bad_input_of_frames_is_one_line(arguments: tuple[str, ...], words: str, elsewhere: Path) -> None:
    process = demo(elsewhere, "frames", *arguments)
    assert process.returncode == 1
    assert process.stderr.startswith(f"error: {words}")
    assert process.stderr.count("\n") == 1


def test_ctrl_c_ends_frames_at_once_and_quietly(elsewhere: Path, start_method: str) -> None:
    with running(elsewhere, "frames", "--frames", "1000000", "--start-method", start_method) as process:
        read_until(process, "processes")
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (130, "\ninterrupted\n")


def test_app_and_worker_do_not_go_on_for_long_without_main(elsewhere: Path) -> None:
    many = ("--pattern", ".") * 50
    with running(elsewhere, "worker", "--path", sysconfig.get_paths()["stdlib"], *many) as process:
        read_until(process, "search 1")
        process.kill()
        process.communicate(timeout=60)  # the end of its output, which app and worker hold as well


@pytest.mark.parametrize("name", ["stream", "offload"])
def test_nobody_reading_the_output_is_no_traceback(name: str, elsewhere: Path, folder: Path) -> None:
    with running(elsewhere, name, "--path", str(folder)) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait(60) == 1
