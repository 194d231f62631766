"""``python -m mpchannel bench``: every scenario is measured in every round, and shown. Never how fast anything is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpchannel.bench import channels, figures, pools, scenarios


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mpchannel", "bench", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=110,
        env=os.environ | {"COLUMNS": "200"},
    )


def number(text: str) -> float:
    return float(text.replace(",", ""))


def test_bench_measures_every_scenario_with_both(tmp_path: Path) -> None:
    # A hundredth: 1,000 messages in a burst, which is more than a Pipe holds.
    ran = run(tmp_path, "--quick", "--rounds", "1", "--scale", "0.01", "--json", "figures.json")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.search(r"cores: \d+, rounds: 1$", ran.stdout, re.MULTILINE)
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["rounds"] == 1
    assert len(written["scenarios"]) == len(scenarios.SCENARIOS)
    lines = ran.stdout.splitlines()
    for scenario, raw in zip(scenarios.SCENARIOS, written["scenarios"], strict=True):
        assert raw["scenario"].startswith(scenario.name.partition("{")[0])
        (line,) = [line for line in lines if re.match(re.escape(raw["scenario"]) + "  .*" + scenario.better, line)]
        _, unit, pipe, ours, ratio, goal, met, p99, noise, _ = re.split(r" {2,}", line)
        assert unit == scenario.unit
        assert number(ours) > 0
        (figure,) = raw["figures"]["mpchannel"]
        if isinstance(figure, dict):
            assert number(ours) == pytest.approx(figure["p50"], rel=0.05)
            assert number(p99) == pytest.approx(figure["p99"], rel=0.05)
            assert figure["p99"] >= figure["p50"]
        else:
            assert number(ours) == pytest.approx(figure, rel=0.05)
            assert p99 == "-"
        assert noise == "-"  # of one round
        assert (goal == "-") == (scenario.goal is None)
        if scenario.name.startswith("burst"):
            assert number(pipe.removeprefix("stuck at ")) > 0
            assert raw["figures"]["Pipe"] == [{"stuck_after": number(pipe.removeprefix("stuck at "))}]
            assert ratio == "-"
        elif scenario.name.endswith("a fork lives on"):
            assert (pipe, ratio, met) == ("never", "-", "-")
        elif not scenario.pipe_can:
            assert (pipe, ratio) == ("-", "-")
            assert set(raw["figures"]) == {"mpchannel"}
        else:
            assert number(pipe) > 0
            assert number(ratio.removesuffix("x")) == pytest.approx(number(ours) / number(pipe), rel=0.05)
        if scenario.goal is not None:
            reached = number(ours if scenario.goal.absolute else ratio.removesuffix("x"))
            if reached != pytest.approx(scenario.goal.limit, rel=0.01):
                assert met == ("yes" if (reached < scenario.goal.limit) == (scenario.better == "lower") else "no")


def test_only_some_scenarios(tmp_path: Path) -> None:
    ran = run(tmp_path, "--rounds", "2", "--scale", "0.01", "--only", "create", "--json", "figures.json")
    assert (ran.returncode, ran.stderr) == (0, "")
    (row,) = json.loads((tmp_path / "figures.json").read_text())["scenarios"]
    assert row["scenario"] == "create and close"
    assert len(row["figures"]["Pipe"]) == len(row["figures"]["mpchannel"]) == 2
    assert re.search(r"create and close .* \d+% +lower$", ran.stdout, re.MULTILINE)  # the noise


def test_medians_p99_noise_and_goals_of_a_row() -> None:
    row = {
        "better": "lower",
        "figures": {"Pipe": [4.0, 8.0, 6.0], "mpchannel": [{"p50": 1.0, "p99": 9.0}, {"p50": 3.0, "p99": 7.0}]},
        "goal": {"limit": 0.4, "of": "ratio"},
    }
    assert channels.typical(row["figures"]["mpchannel"]) == 2.0
    assert channels.typical(row["figures"]["mpchannel"], "p99") == 8.0
    assert channels.noise(row["figures"]["mpchannel"]) == 0.5
    assert channels.ratio(row) == pytest.approx(1 / 3)
    assert channels.met(row) is True
    assert channels.met(row | {"better": "higher"}) is False
    assert channels.met(row | {"goal": {"limit": 1.5, "of": "figure"}}) is False
    assert channels.met(row | {"figures": {"Pipe": [{"never": 0.5}], "mpchannel": [1.0]}}) is None
    assert channels.typical([1.0, {"stuck_after": 7}, {"stuck_after": 5}]) == {"stuck_after": 5}


def test_each_round_runs_both_right_after_each_other_in_alternating_order(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def run_once(place: int, kind: int, times: int, module: str) -> Any:
        runs.append((place, kind))
        return 1.0

    monkeypatch.setattr(channels, "run_once", run_once)
    rows = channels.measure(3, 1.0)
    expected = [
        (place, kind)
        for order in ((0, 1), (1, 0), (0, 1))
        for place, scenario in enumerate(scenarios.SCENARIOS)
        for kind in order
        if kind == 1 or scenario.pipe_can
    ]
    assert runs == expected
    assert all(figures == [1.0] * 3 for row in rows for figures in row["figures"].values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--scale", "0"], "--scale more than 0"),
        (["--scale", "nan"], "--scale more than 0"),
        (["--json", "missing/figures.json"], "missing/figures.json"),
        (["--pools", "--rounds", "0"], "--rounds must be at least 1"),
        (["--start-method", "spawn"], "with --pools only"),
        (["--only", "create", "--pools"], "without --pools"),
        (["--only", "nothing of the kind"], "no scenario has 'nothing of the kind' in its name"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(arguments: list[str], words: str, tmp_path: Path) -> None:
    ran = run(tmp_path, *arguments)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch(rf"error: .*{words}.*\n", ran.stderr)


def test_a_run_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def run_once(place: int, kind: int, times: int, module: str) -> Any:
        raise figures.BenchError("it ended without a result")

    monkeypatch.setattr(channels, "run_once", run_once)
    with pytest.raises(figures.BenchError, match=r"round trip, small dict, Pipe: it ended without a result"):
        channels.measure(1, 1.0)
    assert "round 1 of 1" in capfd.readouterr().out


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
