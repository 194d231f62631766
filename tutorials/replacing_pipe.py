"""The same code on multiprocessing and on mpchannel, side by side: ``python tutorials/replacing_pipe.py``.

Each case is a function of the module it uses. It runs in a process of its own, which is stopped if it hangs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import ModuleType

import mpchannel


def both_sides_send_first(mp: ModuleType) -> str:
    """Two processes send 4 MiB to each other before either receives."""

    def swap(connection):
        connection.send_bytes(bytes(4 << 20))
        return len(connection.recv_bytes())

    ours, theirs = mp.Pipe()
    process = mp.get_context("fork").Process(target=swap, args=(theirs,))
    process.start()
    size = swap(ours)
    process.join()
    return f"both got {size:,} bytes"


def end_of_a_killed_worker(mp: ModuleType) -> str:
    """A worker is killed; another one was forked after the first one's pipe was made."""

    def work(connection):
        try:
            connection.recv()
        except EOFError:
            pass

    fork = mp.get_context("fork")
    pipes, workers = [], []
    for _ in range(2):
        ours, theirs = mp.Pipe()
        pipes.append((ours, theirs))
    for _, theirs in pipes:
        worker = fork.Process(target=work, args=(theirs,), daemon=True)
        worker.start()
        workers.append(worker)
    for _, theirs in pipes:
        theirs.close()
    workers[0].kill()
    try:
        pipes[0][0].recv()
    except EOFError:
        return "EOFError"
    return "a message?"


CASES = {each.__name__: each for each in (both_sides_send_first, end_of_a_killed_worker)}
MODULES = {each.__name__: each for each in (multiprocessing, mpchannel)}


def outcome(case: str, module: str, patience: float) -> str:
    """Run one case in a process of its own, for at most *patience* seconds."""
    began = time.perf_counter()
    command = [sys.executable, __file__, "--case", case, "--module", module]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as running:
        try:
            said, _ = running.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            os.killpg(running.pid, signal.SIGKILL)  # with the processes it started
            return f"hangs (stopped after {patience:g} s)"
    return f"{said.strip()}, {time.perf_counter() - began:.1f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--patience", type=float, default=5, help="seconds after which a case hangs (default: 5)")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--module", choices=MODULES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(CASES[options.case](MODULES[options.module]), flush=True)
        return
    for name, case in CASES.items():
        print(case.__doc__)
        for module in MODULES:
            print(f"    {module:16} {outcome(name, module, options.patience)}", flush=True)


if __name__ == "__main__":
    main()
