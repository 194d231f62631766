"""``python -m mpchannel doctor``: what is missing is said, with a remedy, and in the exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from mpchannel import __main__, _kernel, doctor

pytestmark = pytest.mark.leaves("the fork server and resource tracker of the processes that it tries to start")


@pytest.fixture
def without_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_start_methods", list)


def findings(capsys: pytest.CaptureFixture[str], code: int) -> dict[str, dict[str, Any]]:
    assert __main__.main(["doctor", "--json"]) == code
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is (code == 0)
    return {each["name"]: each for each in said["findings"]}


def test_all_is_well_here() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "mpchannel", "doctor"], capture_output=True, text=True, timeout=100, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "everything that channels need is here" in ran.stdout
    for method in ("fork", "spawn", "forkserver"):
        (line,) = (line for line in ran.stdout.splitlines() if f" {method} " in line)
        assert "a process started and posted a message" in line


@pytest.mark.usefixtures("without_starts")
@pytest.mark.parametrize(
    ("name", "module", "feature"),
    [
        ("anonymous memory", os, "memfd_create"),
        ("process handles", os, "pidfd_open"),
        ("queue lengths", _kernel, "queued"),
    ],
)
def test_what_is_missing_is_named_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, module: Any, feature: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(module, feature, refuse)
    found = findings(capsys, 1)[name]
    assert found["state"] == "missing"
    assert "not implemented" in found["found"]
    assert found["remedy"]
    assert __main__.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"-> {found['remedy']}" in out
    assert name in out.splitlines()[-1]


@pytest.mark.usefixtures("without_starts")
def test_what_only_makes_it_slower_is_a_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_kernel.Memory, "only_holder", False)
    found = findings(capsys, 0)["recycling"]
    assert (found["state"], bool(found["remedy"])) == ("note", True)


@pytest.mark.usefixtures("without_starts")
def test_few_open_files_are_told_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (64, 128))
    found = findings(capsys, 0)["open files"]
    assert found["state"] == "note"
    assert "64 allowed (soft), 128 (hard)" in found["found"]
    assert "ulimit -n" in found["remedy"]


def test_a_start_method_that_fails_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", refuse)
    found = findings(capsys, 1)["fork"]
    assert (found["state"], "temporarily unavailable" in found["found"]) == ("missing", True)


@pytest.mark.usefixtures("without_starts")
def test_a_temporary_folder_that_is_missing_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    found = findings(capsys, 1)["TMPDIR"]
    assert "TMPDIR" in found["remedy"]
