"""Every Python block of the README is a script that runs as it stands, and prints what the block behind it shows.

A text block directly behind a Python block is its output. Every other one is marked ``<!-- from a run -->``.
Numbers, channel names and process names are masked, for they differ from run to run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
FILES = [
    path for path in (ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()
]
BLOCK = re.compile(r"^(<!-- from a run -->\n)?```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(path: Path) -> list[tuple[str, str, bool, str]]:
    """Kind, text, whether it is marked, and what stands between the block before and this one."""
    found, end = [], 0
    text = path.read_text("utf-8")
    for match in BLOCK.finditer(text):
        found.append((match[2], match[3], bool(match[1]), text[end : match.start()].strip()))
        end = match.end()
    return found


def scripts() -> list[object]:
    cases = []
    for path in FILES:
        all_of_it = [*blocks(path), ("", "", False, "end")]
        for number, (kind, source, _, _) in enumerate(all_of_it):
            if kind == "python":
                after, shown, marked, between = all_of_it[number + 1]
                output = shown if after == "text" and not marked and not between else ""
                cases.append(pytest.param(source, output, id=f"{path.name}-{number}"))
    return cases


def masked(text: str) -> list[str]:
    text = re.sub(r"\b[0-9a-f]{4}-\d+/\d\b", "<port>", text)
    text = re.sub(r"at \S+\.py:\d+ \([\d:]+, [\d.]+ s ago\)", "at <place>", text)
    text = re.sub(r"\bPool-\d+ ", "<worker> ", text)  # whichever was free
    return re.sub(r"pid[ =]\d+|process \d+", "<pid>", text).splitlines()


@pytest.mark.parametrize("method", ["as it stands", "spawn"])
@pytest.mark.parametrize(("source", "output"), scripts())
def test_a_block_prints_what_is_shown(source: str, output: str, method: str, tmp_path: Path) -> None:
    file = tmp_path / "hello.py"
    start = f"if __name__ == '__main__':\n    import mpchannel\n    mpchannel.set_start_method({method!r})\n"
    file.write_text(source if method != "spawn" else f"{start}{source}", "utf-8")
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    ran = subprocess.run(
        [sys.executable, str(file)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert masked(ran.stdout) == masked(output), ran.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_text_block_has_a_source(path: Path) -> None:
    before = ""
    for kind, text, marked, between in blocks(path):
        assert kind != "text" or marked or (before == "python" and not between), text
        before = kind
