"""The tutorials run from top to bottom in a real Jupyter kernel, and what they show is what they print.

The notebooks assert their own results; here is what they cannot see of themselves: that the committed outputs are
those of the committed code, complete, without errors, and without traces of the machine they were made on.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

import mpchannel

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "tutorials").glob("*.ipynb"))
SECONDS = 120  # for one whole notebook

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


class ThisInterpreter(AsyncKernelManager):
    """Starts the kernel from the Python that runs the tests, whatever kernelspecs are installed, or none."""

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def run(notebook: Any, folder: Path) -> None:
    """Execute in place. Raises ``CellExecutionError`` for the first cell that fails. Everything is over afterwards."""
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        kernel_manager_class=ThisInterpreter,
        timeout=SECONDS // 2,  # for one cell, which the error then names
        coalesce_streams=True,  # or what one print() wrote may come in several pieces
    )
    client.km = client.create_kernel_manager()
    client.km.connection_file = str(folder / "kernel.json")
    client.km.transport = "ipc"  # sockets in the folder: no race for free ports with other test processes
    client.km.ip = str(folder / "socket")
    settings = {name: str(folder) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")}
    package = str(Path(mpchannel.__file__).parents[1])
    search = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    # (In what it takes for its own tests, the kernel does not pass on what its children print.)
    around = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    # Not client.execute(): it leaves its event loop open, and the next test would be blamed for that.
    asyncio.run(
        asyncio.wait_for(
            client.async_execute(cwd=str(ROOT / "tutorials"), env={**around, **settings, "PYTHONPATH": search}),
            SECONDS,
        )
    )


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(output: Any) -> str:
    if output.output_type == "error":
        return "\n".join(output.traceback)
    return str(output.text if output.output_type == "stream" else output.data.get("text/plain", ""))


def shown(cell: Any) -> list[tuple[str, str]]:
    """What a reader sees below the cell, with the names of channels and all numbers (pids, times) masked."""
    masked = []
    for output in cell.outputs:
        text = re.sub(r"\b[0-9a-f]{4}-\d+\b", "<channel>", text_of(output))
        masked.append((output.output_type, re.sub(r"-?\d[\d.,:]*", "#", text)))
    return masked


def test_the_tutorials_are_one_course() -> None:
    names = [path.name for path in NOTEBOOKS]
    assert [name[:3] for name in names] == [f"{number:02}-" for number in range(1, 9)]
    index = (ROOT / "tutorials" / "README.md").read_text("utf-8")
    assert re.findall(r"\]\(([\w.-]+\.ipynb)\)", index) == names
    for number, path in enumerate(NOTEBOOKS):
        cells = nbformat.read(path, as_version=4).cells
        assert "](README.md)" in cells[0].source
        if number > 0:
            assert f"]({names[number - 1]})" in cells[0].source.splitlines()[2]
        if number + 1 < len(names):
            assert cells[-1].source.endswith(f"]({names[number + 1]}).")


@each_notebook
def test_links_lead_to_files_that_are_there(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#]+)\)", cell.source):
                assert target.startswith("https://") or (path.parent / target).exists(), target


@each_notebook
@pytest.mark.timeout(SECONDS + 60)
def test_a_tutorial_runs_and_prints_what_is_committed(path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    committed = nbformat.read(path, as_version=4)
    executed = nbformat.read(path, as_version=4)
    # A short name: the path of a socket has at most 107 characters.
    run(executed, tmp_path_factory.mktemp("nb"))
    for before, after in zip(code_cells(committed), code_cells(executed), strict=True):
        assert shown(after) == shown(before), f"the outputs of cell {before.id!r} are old: execute the notebook again"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
@pytest.mark.timeout(SECONDS + 60)
def test_what_a_worker_prints_reaches_the_notebook(method: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    source = f"""
        import asyncio, sys, mpchannel
        def work():
            print("on stdout")
            print("on stderr", file=sys.stderr)
        ended = asyncio.Event()
        worker = mpchannel.Worker(work, context="{method}")
        worker.onexit = lambda event: ended.set()
        await asyncio.wait_for(ended.wait(), 20)
        await asyncio.sleep(1)  # for the kernel, which passes on what its children print
    """
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(textwrap.dedent(source))])
    run(notebook, tmp_path_factory.mktemp("nb"))
    printed = {output.name: output.text for output in notebook.cells[0].outputs}
    assert printed["stdout"] == "on stdout\n"
    assert "on stderr\n" in printed["stderr"]  # where Python may warn of a fork of the kernel's threads


@each_notebook
def test_committed_outputs_are_those_of_one_clean_run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error", cell.id
            assert output.get("name") != "stderr", (cell.id, output.text)
            assert "Traceback (most recent call last)" not in text_of(output), cell.id
            assert text_of(output).strip(), f"an output of cell {cell.id!r} is empty"


@each_notebook
def test_a_tutorial_carries_no_trace_of_a_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert dict(notebook.metadata.language_info) == {"name": "python"}
    assert not [cell.id for cell in notebook.cells if "execution" in cell.metadata]  # time stamps
    everything = [cell.source for cell in notebook.cells]
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if "image/png" in output.get("data", ()):  # in base64, which has anything in it
                output = {**output, "data": {**output.data, "image/png": "..."}}
            everything.append(str(output))
    paths = re.findall(r"(?<![\w.:/<])/(?:[\w.-]+/)+[\w.-]*", "\n".join(everything))
    # Jupyter's name for a cell, the same on every machine but for its numbers; and what every Linux has.
    assert not [path for path in paths if not path.startswith(("/tmp/ipykernel_", "/proc/self/", "/dev/shm"))]
