"""``python -m mpchannel bench``: every scenario is measured in every round, and shown. Never how fast anything is."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as command
from benchmarks import peers
from mpchannel.bench import channels, chart, ends, figures, goals, kinds, pools

pytestmark = pytest.mark.once


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mpchannel", "bench", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=110,
    )


def number(text: str) -> float:
    return float(text.replace(",", ""))


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """What a run of a hundredth has printed and written: 1,000 messages in a burst, which is more than a Pipe holds."""
    folder = tmp_path_factory.mktemp("bench")
    ran = run(folder, "--quick", "--rounds", "1", "--scale", "0.01", "--json", "figures.json")
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout, json.loads((folder / "figures.json").read_text())


def test_bench_measures_every_scenario_with_both(small_run: tuple[str, dict[str, Any]]) -> None:
    printed, written = small_run
    assert re.search(r"cores: \d+, rounds: 1$", printed, re.MULTILINE)
    assert written["rounds"] == len(written["same_loop_ms"]) == 1
    assert [row["key"] for row in written["scenarios"]] == [scenario.name for scenario in channels.SCENARIOS]
    first_table, _, second_table = printed.partition("99th percentile")
    assert max(map(len, printed.splitlines())) <= 80
    for scenario, row in zip(channels.SCENARIOS, written["scenarios"], strict=True):
        can = [kind.name for kind in kinds.KINDS if scenario.group in kind.groups]
        assert (row["unit"], row["better"], row["pinned"]) == (scenario.unit, scenario.better, scenario.pinned)
        assert list(row["figures"]) == can
        (line,) = [line for line in first_table.splitlines() if re.match(rf"{re.escape(row['scenario'])} {{2,}}", line)]
        _, unit, pipe, ours, ratio, goal, met = re.split(r" {2,}", line)
        assert unit == scenario.unit
        assert number(ours) > 0
        assert row["figures"]["mpchannel"] == [pytest.approx(number(ours), rel=0.05)]
        if scenario.group is kinds.Group.BURST or (scenario.group is kinds.Group.POST and scenario.size):
            assert row["figures"]["Pipe"] == [{"stuck_after": number(pipe.removeprefix("stuck "))}]
        elif "bystander" in scenario.name:
            assert (pipe, row["figures"]["Pipe"]) == ("never", [{"never_within": 1.0}])
        elif "Pipe" not in can:
            assert pipe == "-"
        else:
            (figure,) = row["figures"]["Pipe"]
            assert figure > 0 or scenario.group is kinds.Group.MEMORY  # so few that they fit in between
            assert number(pipe) == pytest.approx(figure, rel=0.05, abs=0.006)
            if scenario.name not in goals.GOALS and figure:
                assert number(ratio) == pytest.approx(row["figures"]["mpchannel"][0] / figure, rel=0.01)
        assert (goal == "-") == (scenario.name not in goals.GOALS)
        assert met == {None: "-", True: "yes", False: "NO"}[row["met"]]
        (line,) = [line for line in second_table.splitlines() if line.startswith(row["scenario"] + " ")]
        assert (re.split(r" {2,}", line)[3] != "-") == ("mpchannel" in row["p99"])


def test_whatever_is_a_time_has_a_99th_percentile(small_run: tuple[str, dict[str, Any]]) -> None:
    for row in small_run[1]["scenarios"]:
        if row["unit"] not in ("us", "ms") or row["key"].startswith("move"):
            assert not row["p99"]
            continue
        for name, (outcome,) in row["figures"].items():
            assert isinstance(outcome, dict) or row["p99"][name][0] >= outcome > 0


def test_the_run_says_first_which_peers_are_there(small_run: tuple[str, dict[str, Any]]) -> None:
    printed, written = small_run
    begin = printed.partition("medians")[0]
    (found,) = re.findall(r"^peers found: (.*)$", begin, re.MULTILINE)
    (missing,) = re.findall(r"^peers missing: (.*)$", begin, re.MULTILINE)
    for module, project in figures.PEERS.items():
        there = importlib.util.find_spec(module) is not None
        assert (project in found, project in missing) == (there, not there) == (project in written["peers"], not there)


# The chart


@pytest.mark.leaves("Matplotlib keeps its fonts open")
@pytest.mark.parametrize("ending", chart.ENDINGS)
def test_a_run_can_be_drawn(ending: str, tmp_path: Path, small_run: tuple[str, dict[str, Any]]) -> None:
    written = small_run[1]
    file = tmp_path / f"chart{ending}"
    chart.draw(written, written["scenarios"], str(file))
    if ending == ".png":
        assert file.read_bytes().startswith(b"\x89PNG")
        return
    drawn = file.read_text()
    for row in written["scenarios"]:
        goal = goals.GOALS.get(row["key"])
        compared = row["ratio"] is not None and (goal is None or goal.of == "Pipe")
        assert (f">{row['scenario']}<" in drawn) == compared
        assert (f">{row['scenario']}: mpchannel<" in drawn) == (row["unit"] == "1/s" and not compared)
    chart.draw(written, written["scenarios"], str(file))
    assert file.read_text() == drawn


def test_a_chart_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chart, "has_matplotlib", lambda: False)
    with pytest.raises(figures.BenchError, match=r"pip install 'mpchannel\[bench\]'"):
        chart.check("chart.png")


# The goals


def row_of(key: str, pipe: list[Any], ours: list[Any]) -> dict[str, Any]:
    return {"key": key, "scenario": key, "figures": {"Pipe": pipe, "mpchannel": ours}}


@pytest.mark.parametrize(
    ("key", "pipe", "ours", "ratio", "met"),
    [
        ("round trip, one core", [9.0, 10.0, 30.0], [1.0, 6.0, 7.0], 0.6, True),
        ("round trip, one core", [10.0], [6.1], 0.61, False),
        ("hand over, one core", [10.0], [70.0], 7.0, True),
        ("hand over, one core", [10.0], [69.0], 6.9, False),
        ("burst of {times:,}, posted", [{"stuck_after": 278}], [400_000.0], None, True),
        ("burst of {times:,}, posted", [{"stuck_after": 278}], [399_999.0], None, False),
        ("import", [], [15.0], None, True),
        ("import", [], [15.1], None, False),
        ("import", [], [3.0, {"loads": "numpy"}], None, False),
        ("hand over", [2.0], [3.0], 1.5, None),
    ],
)
def test_a_goal_is_met_or_not(key: str, pipe: list[Any], ours: list[Any], ratio: float | None, met: bool) -> None:
    row = row_of(key, pipe, ours)
    goals.judge([row])
    assert row["ratio"] == (None if ratio is None else pytest.approx(ratio))
    assert row["met"] is met


def test_a_goal_may_be_about_another_row() -> None:
    rows = [
        row_of("SIGKILL noticed", [2.0], [2.5]),
        row_of("SIGKILL, with a bystander", [{"never_within": 1.0}], [2.4]),
        row_of("post, none queued", [1.0], [4.0]),
        row_of("post, {size:,} queued", [{"stuck_after": 278}], [6.0]),
    ]
    goals.judge(rows)
    assert [row["ratio"] for row in rows] == [1.25, 1.2, 4.0, 1.5]
    assert [row["met"] for row in rows] == [False, True, None, False]
    assert goals.count_met(rows) == "goals met: 1 of 3"


def test_every_goal_has_its_row_and_what_it_is_about() -> None:
    names = {scenario.name for scenario in channels.SCENARIOS}
    assert set(goals.GOALS) <= names
    for scenario in channels.SCENARIOS:
        goal = goals.GOALS.get(scenario.name)
        if goal is not None:
            assert goal.row is None or goal.row in names
            assert (goal.direction == goals.AT_MOST) == (scenario.better == figures.LOWER)


def test_noise_is_how_far_the_middle_half_of_the_rounds_is_apart() -> None:
    assert goals.spread([100.0, 90.0, 110.0, 1000.0, 1.0]) == pytest.approx(0.2)
    assert goals.spread([5.0]) is None
    assert goals.spread([5.0, {"stuck_after": 1}]) is None


# Runs


def test_import_time_tells_what_should_not_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "_TIME_IMPORT", ends._TIME_IMPORT.replace("import mpchannel", "import asyncio"))
    end, other = kinds.PIPE.pair()
    with end, other:
        side = kinds.Side(near=True, kind=kinds.PIPE, end=end, signal=other, times=1, size=0)
        with pytest.raises(kinds.Missed) as missed:
            ends.import_time(side)
    assert missed.value.args == ("loads", "asyncio")


def test_too_many_descriptors_are_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends.resource, "getrlimit", lambda _: (64, 1_000))
    with pytest.raises(kinds.Missed) as missed:
        ends.room_for(1_000)
    assert missed.value.args == ("needs_descriptors", 1_100)


def test_each_round_runs_both_right_after_each_other_in_alternating_order(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def run_once(place: int, kind: kinds.Kind, scale: float) -> Any:
        runs.append((place, kind.name))
        return kinds.Measured(1.0, 2.0)

    monkeypatch.setattr(channels, "run_once", run_once)
    rows, work = channels.measure(3, 1.0)
    expected = [
        (place, kind.name)
        for order in ((0, 1), (1, 0), (0, 1))
        for place, scenario in enumerate(channels.SCENARIOS)
        for kind in (kinds.KINDS[each] for each in order)
        if scenario.group in kind.groups
    ]
    assert runs == expected
    assert len(work) == 3
    assert all(figures == [1.0] * 3 for row in rows for figures in row["figures"].values())
    assert all(figures == [2.0] * 3 for row in rows for figures in row["p99"].values())
    assert all(noise == 0 for row in rows for noise in row["noise"].values())


def test_sizes_shrink_only_below_a_fifth() -> None:
    scenario = next(each for each in channels.SCENARIOS if each.name == "{size:,} ends, flood")
    assert [scenario.scaled(scale)[0] for scale in (2, 1, 0.2, 0.1)] == [
        "1,000 ends, flood",
        "1,000 ends, flood",
        "1,000 ends, flood",
        "500 ends, flood",
    ]
    assert [scenario.scaled(scale).times for scale in (2, 1, 0.2, 0.001)] == [100, 50, 10, 1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--scale", "0"], "--scale more than 0"),
        (["--scale", "nan"], "--scale more than 0"),
        (["--json", "missing/figures.json"], "missing/figures.json"),
        (["--pools", "--rounds", "0"], "--rounds must be at least 1"),
        (["--start-method", "spawn"], "with --pools only"),
        (["--chart", "chart.pdf"], "a .png or .svg file, not chart.pdf"),
        (["--chart", "missing/chart.png"], "missing/chart.png"),
        (["--pools", "--chart", "chart.png"], "for channels, not for --pools"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(arguments: list[str], words: str, tmp_path: Path) -> None:
    ran = run(tmp_path, *arguments)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch(rf"error: .*{words}.*\n", ran.stderr)


def test_a_run_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def run_once(place: int, kind: kinds.Kind, scale: float) -> Any:
        raise figures.BenchError("it ended without a result")

    monkeypatch.setattr(channels, "run_once", run_once)
    with pytest.raises(figures.BenchError, match=r"round trip, small dict, Pipe: it ended without a result"):
        channels.measure(1, 1.0)
    assert "round 1 of 1" in capfd.readouterr().out


# Peers


ALL_PEERS = """
import json
from benchmarks import peers
from mpchannel.bench import channels
for kind in peers.present():
    for place, scenario in enumerate(channels.SCENARIOS):
        if scenario.group in kind.groups:
            print(json.dumps([kind.name, scenario.name, channels.run_once(place, kind, 0.01)]))
"""


def test_every_peer_that_is_installed_can_do_what_it_takes_part_in() -> None:
    root = Path(peers.__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", ALL_PEERS], cwd=root, capture_output=True, text=True, timeout=110)
    assert (ran.returncode, ran.stderr) == (0, "")
    outcomes = {(name, scenario): outcome for name, scenario, outcome in map(json.loads, ran.stdout.splitlines())}
    for kind in peers.present():
        for scenario in channels.SCENARIOS:
            if scenario.group in kind.groups:
                outcome = outcomes[kind.name, scenario.name]
                if kind.name == "SimpleQueue" and scenario.group is kinds.Group.BURST:
                    assert outcome["stuck_after"] > 0
                else:
                    assert outcome[0] > 0


def test_a_run_with_peers_writes_figures_table_and_chart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = []

    def run_once(place: int, kind: kinds.Kind, scale: float) -> Any:
        runs.append((place, kind))
        if kind.name == "Queue":
            raise figures.BenchError("it ended without a result")
        return kinds.Measured(3.0 if kind is kinds.OURS else 2.0, 4.0)

    monkeypatch.setattr(channels, "run_once", run_once)
    monkeypatch.setattr(chart, "draw", lambda about, rows, path: Path(path).write_text("drawn"))
    assert command.main(["--rounds", "2", "--out", str(tmp_path / "new" / "results")]) == 0
    everything = [*kinds.KINDS, *peers.present()]
    assert sorted(runs[: len(runs) // 2], key=repr) == sorted(
        (
            (place, kind)
            for place, scenario in enumerate(channels.SCENARIOS)
            for kind in everything
            if scenario.group in kind.groups
        ),
        key=repr,
    )
    written = json.loads((tmp_path / "new" / "results" / "figures.json").read_text())
    (row,) = [row for row in written["scenarios"] if row["key"] == "one way, 1 KiB"]
    assert row["figures"]["Pipe"] == row["figures"]["SimpleQueue"] == [2.0, 2.0]
    assert row["figures"]["Queue"] == [{"failed": "it ended without a result"}] * 2
    table = (tmp_path / "new" / "results" / "table.md").read_text()
    assert "\n| one way, 1 KiB | 1/s | 2.00 | 3.00 | 1.50 | >=2.2 | **NO** | 4.00 | 4.00 | 0% / 0% |\n" in table
    assert re.search(
        r"^\| one way, 1 KiB \| 1/s \| 2.00 \| 3.00 \(1.50x\) \| failed \| 2.00 \(1.00x\) \|.* mpchannel \|$",
        table,
        re.M,
    )
    assert (tmp_path / "new" / "results" / "chart.svg").read_text() == "drawn"
    assert "round 1 of 2" in capfd.readouterr().out


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--scale", "-1"], ["--out", "/dev/null/results"]])
def test_bad_input_of_a_run_with_peers_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 1
    assert re.fullmatch(r"error: .*\n", capsys.readouterr().err)


# Pools


@pytest.mark.parametrize("start_method", ["spawn", "forkserver"])
def test_bench_measures_every_pool_that_is_installed(start_method: str, tmp_path: Path) -> None:
    arguments = "--pools", "--rounds", "2", "--scale", "0.002", "--start-method", start_method
    ran = run(tmp_path, *arguments, "--json", "figures.json")
    assert (ran.returncode, ran.stderr) == (0, "")
    written = json.loads((tmp_path / "figures.json").read_text())
    names = [pools.KINDS[place].name for place in pools.present()]
    assert names[:3] == ["mpchannel.WorkerPool", "multiprocessing.Pool", "ProcessPoolExecutor"]
    assert (written["rounds"], written["workers"], written["start_method"]) == (2, 2, start_method)
    assert {"python", "mpchannel"} <= set(written["versions"])
    assert ("loky" in written["versions"], "loky" in written["missing"]) == ("loky" in names, "loky" not in names)
    assert ("loky is not installed" in ran.stdout) == ("loky" not in names)
    assert len(written["scenarios"]) == len(pools.SCENARIOS)
    for scenario, row in zip(pools.SCENARIOS, written["scenarios"], strict=True):
        assert (row["scenario"], row["unit"], row["better"]) == scenario[:3]
        assert list(row["figures"]) == names
        assert all(len(each) == 2 and min(each) > 0 for each in row["figures"].values())
        ours = row["figures"][names[0]]
        for name in names[1:]:
            first, second = (our / their for our, their in zip(ours, row["figures"][name], strict=True))
            assert row["ratios"][name] == pytest.approx((first + second) / 2)
    for name in names:
        (line,) = [line for line in ran.stdout.splitlines() if re.match(rf"{name} {{2,}}[\d-]", line)]
        _, *shown = line.split()
        for row, median, ratio in zip(written["scenarios"], shown[::2], shown[1::2], strict=True):
            assert number(median) == pytest.approx(sum(row["figures"][name]) / 2, rel=0.05)
            assert ratio == "-" if name == names[0] else number(ratio) == pytest.approx(row["ratios"][name], rel=0.05)


def test_each_round_of_pools_begins_with_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def run_once(place: int, start_method: str, times: Any) -> list[float]:
        runs.append(place)
        return [1.0 + place] * len(times)

    monkeypatch.setattr(pools, "run_once", run_once)
    monkeypatch.setattr(pools, "present", lambda: [0, 1, 3])
    rows = pools.measure(3, 1.0, "spawn")
    assert runs == [0, 1, 3, 1, 3, 0, 3, 0, 1]
    for row in rows:
        assert row["ratios"] == {"multiprocessing.Pool": 0.5, "loky": 0.25}


def test_the_ratio_is_the_median_of_the_rounds() -> None:
    measured = {"mpchannel.WorkerPool": [1.0, 6.0, 9.0], "loky": [1.0, 2.0, 1.0]}
    assert pools.ratios(measured) == {"loky": 3.0}


def test_a_pool_that_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pools, "present", lambda: [0, 1, 2])
    about = figures.surroundings(1, 1.0) | pools.surroundings("spawn")
    assert about["missing"] == ["loky"]
    assert "loky" not in about["versions"]
    pools.print_about(about)
    assert "loky is not installed, and not measured" in capsys.readouterr().out
