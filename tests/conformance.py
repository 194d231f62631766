"""CPython's own tests of multiprocessing, run on mpchannel: ``python -m tests.conformance [options] [name ...]``.

They are taken from the Python that runs this (``test._test_multiprocessing``, which some systems package separately),
with every import of ``multiprocessing`` turned into one of ``mpchannel``. Each *name* is a part of a test's class name;
default: all. ``--compare`` runs the unchanged tests as well; then those count that pass there and fail here.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

METHODS = ("fork", "spawn", "forkserver")
_MODULE = "_test_multiprocessing"
_RUN = """
import json, sys, unittest, warnings
module, method, out, names = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]

class Result(unittest.TextTestResult):
    passed = ()
    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += (test.id(),)

tests = __import__(module, fromlist=["*"])
tests.install_tests_in_module_dict(globals(), method)  # here, so that children find them too

if __name__ == "__main__":
    suite = unittest.TestSuite()
    for name, kind in list(globals().items()):
        if isinstance(kind, type) and issubclass(kind, unittest.TestCase):
            if not names or any(each in name for each in names):
                suite.addTest(unittest.defaultTestLoader.loadTestsFromTestCase(kind))
    setUpModule()
    try:
        result = unittest.TextTestRunner(resultclass=Result, verbosity=2).run(suite)
    finally:
        tearDownModule()
    bad = {test.id(): text for test, text in (*result.failures, *result.errors)}
    with open(out, "w") as file:
        json.dump({"passed": result.passed, "bad": bad, "skipped": [test.id() for test, _ in result.skipped]}, file)
"""


# What cannot hold here, with the reason.
EXCEPT = {
    "_TestImportStar.test_import": "takes the files in the package's folder for the submodules of multiprocessing",
    "TestIgnoreEINTR.test_ignore": "wants a child to be blocked in send_bytes() until its parent receives",
    "TestPoolWorkerErrors.test_unpickleable_result": "wants a lambda not to be picklable, which is one here",
}


def _renamed(source: str) -> str:
    """``multiprocessing`` -> ``mpchannel`` in the imports of a module, line for line."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            changed = "; ".join(_import(each) for each in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "multiprocessing":
            changed = ast.unparse(node).replace("multiprocessing", "mpchannel", 1)
        else:
            continue
        if changed != ast.unparse(node):
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            indent = lines[first][: node.col_offset]
            lines[first:last] = [indent + changed + "\n", *["\n"] * (last - first - 1)]
    return "".join(lines)


def _import(name: ast.alias) -> str:
    if name.name.split(".")[0] != "multiprocessing":
        return ast.unparse(ast.Import([name]))
    changed = ast.unparse(ast.Import([ast.alias(name.name.replace("multiprocessing", "mpchannel", 1), name.asname)]))
    return changed if name.asname else f"{changed}; import mpchannel as multiprocessing"


def available() -> bool:
    """Whether this Python has its own tests."""
    try:
        return importlib.util.find_spec("test._test_multiprocessing") is not None
    except ModuleNotFoundError:
        return False


def run(method: str, names: list[str], *, changed: bool = True, timeout: float = 1800) -> dict[str, Any]:
    """Run the tests: {"passed": names, "bad": {name: traceback}, "skipped": names, "output": text}."""
    spec = importlib.util.find_spec("test._test_multiprocessing")
    assert spec is not None
    assert spec.origin is not None
    here = Path(spec.origin).parent
    with tempfile.TemporaryDirectory() as folder:
        for path in (Path(spec.origin), *here.glob("mp_*.py")):
            source = path.read_text()
            (Path(folder) / path.name).write_text(_renamed(source) if changed else source)
        (Path(folder) / "run_them.py").write_text(_RUN)
        places = [folder, os.path.dirname(os.path.dirname(os.path.abspath(__file__))), os.environ.get("PYTHONPATH", "")]
        out = Path(folder) / "out.json"
        done = subprocess.run(
            [sys.executable, "run_them.py", _MODULE, method, str(out), *names],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
        if not out.exists():
            raise RuntimeError(f"the tests ended with code {done.returncode}:\n{done.stdout[-5000:]}")
        found = json.loads(out.read_text())
        if changed:
            found["bad"] = {name: text for name, text in found["bad"].items() if not name.endswith(tuple(EXCEPT))}
        return {**found, "output": done.stdout}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, action="append", help="start method (default: all three)")
    parser.add_argument("--compare", action="store_true", help="run them on multiprocessing as well")
    parser.add_argument("--verbose", action="store_true", help="print what the tests print")
    parser.add_argument("names", nargs="*", help="parts of class names")
    options = parser.parse_args()
    worse = 0
    for method in options.method or METHODS:
        ours = run(method, options.names)
        if options.verbose:
            print(ours["output"])
        bad = ours["bad"]
        if options.compare:
            theirs = run(method, options.names, changed=False)
            for name in theirs["bad"]:
                if bad.pop(name, None) is not None:
                    print(f"{name} fails on multiprocessing as well")
        for name, text in bad.items():
            print(f"--- {method}: {name}\n{text}")
        print(f"{method}: {len(ours['passed'])} passed, {len(bad)} failed, {len(ours['skipped'])} skipped")
        if not ours["passed"] and not bad:
            parser.error(f"no test ran: is there a class whose name has one of {options.names} in it?")
        worse += len(bad)
    return min(worse, 1)


if __name__ == "__main__":
    sys.exit(main())
