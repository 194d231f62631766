"""``python -m mpchannel bench``: every scenario is measured in every round, and shown. Never how fast anything is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpchannel import bench


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


def test_bench_measures_every_scenario_with_both(tmp_path: Path) -> None:
    # A hundredth: 1,000 messages in a burst, which is more than a Pipe holds.
    ran = run(tmp_path, "--quick", "--rounds", "1", "--scale", "0.01", "--json", "figures.json")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.search(r"cores: \d+, rounds: 1$", ran.stdout, re.MULTILINE)
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["rounds"] == 1
    assert len(written["scenarios"]) == len(bench.SCENARIOS)
    lines = ran.stdout.splitlines()
    for scenario, raw in zip(bench.SCENARIOS, written["scenarios"], strict=True):
        assert raw["scenario"].startswith(scenario.name.partition("{")[0])
        (line,) = [line for line in lines if line.startswith(raw["scenario"]) and line.endswith(scenario.better)]
        _, unit, pipe, ours, ratio, _ = re.split(r" {2,}", line)
        assert unit == scenario.unit
        assert number(ours) > 0
        assert raw["figures"]["mpchannel"] == [pytest.approx(number(ours), rel=0.05)]
        if scenario.name.startswith("burst"):
            assert number(pipe.removeprefix("stuck at ")) > 0
            assert raw["figures"]["Pipe"] == [{"stuck_after": number(pipe.removeprefix("stuck at "))}]
            assert ratio == "-"
        else:
            assert number(pipe) > 0
            assert number(ratio) == pytest.approx(number(ours) / number(pipe), rel=0.05)


def test_each_round_runs_both_right_after_each_other_in_alternating_order(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def run_once(place: int, kind: int, times: int) -> Any:
        runs.append((place, kind))
        return 1.0

    monkeypatch.setattr(bench, "run_once", run_once)
    rows = bench.measure(3, 1.0)
    places = range(len(bench.SCENARIOS))
    assert runs == [(place, kind) for order in ((0, 1), (1, 0), (0, 1)) for place in places for kind in order]
    assert all(figures == [1.0] * 3 for row in rows for figures in row["figures"].values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--scale", "0"], "--scale more than 0"),
        (["--scale", "nan"], "--scale more than 0"),
        (["--json", "missing/figures.json"], "missing/figures.json"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(arguments: list[str], words: str, tmp_path: Path) -> None:
    ran = run(tmp_path, *arguments)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch(rf"error: .*{words}.*\n", ran.stderr)


def test_a_run_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run_once(place: int, kind: int, times: int) -> Any:
        raise bench.BenchError("it ended without a result")

    monkeypatch.setattr(bench, "run_once", run_once)
    with pytest.raises(bench.BenchError, match=r"round trip, small dict, Pipe: it ended without a result"):
        bench.measure(1, 1.0)
    assert "round 1 of 1" in capsys.readouterr().out
