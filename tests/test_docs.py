"""The documentation site builds without a warning, is complete, and what is public says what it takes and raises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mpchannel

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
SITE = (
    "docs/index",
    "docs/promises",
    "docs/design",
    "docs/performance",
    "docs/security",
    "docs/limitations",
    "docs/faq",
)


@pytest.mark.timeout(240)
def test_the_site_builds_without_a_warning_and_leaves_the_sources_alone(tmp_path: Path) -> None:
    before = sorted(path for folder in ("docs", "tutorials") for path in (ROOT / folder).rglob("*"))
    built = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-q",
            "-W",
            "--keep-going",
            "-c",
            "docs",
            "-d",
            tmp_path / "trees",
            ".",
            tmp_path / "site",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    pages = [*SITE, "docs/reference", *(f"tutorials/{path.stem}" for path in (ROOT / "tutorials").glob("*.ipynb"))]
    front = (tmp_path / "site" / "docs" / "index.html").read_text("utf-8")
    for page in pages:
        assert (tmp_path / "site" / f"{page}.html").exists()
        assert page == "docs/index" or f'{page.rpartition("/")[2]}.html"' in front, f"{page} is in no table of contents"
    assert before == sorted(path for folder in ("docs", "tutorials") for path in (ROOT / folder).rglob("*"))


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "reference.rst").read_text("utf-8")
    described = set(re.findall(r"^\.\. (?:auto\w+|py:data|py:module):: ([\w.]+)$", text, re.M))
    listed = set(re.findall(r"^- ``(\w+)``$", text, re.M))
    wanted = {"mpchannel.ipc" if name == "ipc" else name for name in mpchannel.__all__}
    assert {
        name for name in described | listed if not name.startswith(("mpchannel.ipc.", "mpchannel.testing"))
    } == wanted
    assert listed == {name for name in wanted if name in mpchannel._forwarded}  # ours are described
