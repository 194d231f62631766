"""Promises broken on purpose, and the tests that notice: ``python -m tests.mutations [name ...]`` prints the table.

Each mutation changes one place of a copy of the package in a folder of its own, in a way that loads and looks like an
error somebody could make. The text it replaces must be there exactly once, so that this list cannot rot unseen. The
test it names must pass as long as nothing is changed, and fail when this is.
"""

from __future__ import annotations

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parent.parent
HANG = 5
"""Seconds after which a test that takes a fraction of one waits for what will never come."""


@dataclass(frozen=True)
class Mutation:
    """A promise, what breaks it, and the test that notices."""

    name: str
    promise: str
    file: str
    """In the package."""
    old: str
    new: str
    test: str
    """The id of one test, from the folder of the tests on."""
    rows: tuple[str, ...] = ()
    """Of the behaviour tables: those that the test is marked with."""


MUTATIONS = (
    Mutation(
        "drop",
        "What is posted is received.",
        "_end.py",
        "        if not outbox.append(*first, None):\n",
        "        if False:\n",
        "test_overflow.py::test_a_burst_of_a_process_that_has_ended_arrives_in_order_and_then_the_close[fork]",
        ("H03", "N49"),
    ),
    Mutation(
        "double",
        "A message is received once.",
        "_end.py",
        "        if not outbox.append(*first, None):\n",
        "        outbox.append(*first, None)\n        if not outbox.append(*first, None):\n",
        "test_posting.py::test_posting_20000_small_messages_to_a_port_never_started_does_not_block[forward]",
        ("H03",),
    ),
    Mutation(
        "reorder",
        "Messages are received in the order they were posted in.",
        "_overflow.py",
        "        last = place + len(packets) - 1\n",
        "        packets[1:3] = packets[2:0:-1]\n        last = place + len(packets) - 1\n",
        "test_posting.py::test_order_is_kept_while_the_receiver_takes_now_a_few_and_now_many",
    ),
    Mutation(
        "block",
        "Posting never waits for the receiver.",
        "_end.py",
        "                self._send(data, SEND_NOW)\n",
        "                self._send(data, SEND_NOW & ~0x40)  # without MSG_DONTWAIT\n",
        "test_posting.py::test_posting_20000_small_messages_to_a_port_never_started_does_not_block[forward]",
        ("H03",),
    ),
    Mutation(
        "detach early",
        "A post that raises detaches nothing.",
        "_clone.py",
        "        while (sent or lost) and pending:\n",
        "        while pending:\n",
        "test_limits.py::test_what_cannot_be_posted_at_the_limit_is_refused_and_nothing_is_detached_or_lost"
        "[overflow with a port-64]",
    ),
    Mutation(
        "detach nothing",
        "A post that succeeded has detached all that is listed.",
        "_clone.py",
        "                pending.pop()\n",
        "                pending.clear()\n",
        "test_transfer.py::test_every_listed_port_is_detached_when_post_message_returns[forward]",
        ("H19", "W52", "N41"),
    ),
    Mutation(
        "silence of the detached",
        "Posting on a port that moved away raises.",
        "_link.py",
        "            self._leave_outbox()\n            self._release(_refuse(error), error)\n",
        "            self._leave_outbox()\n            self._release(_refuse_posts, error)\n",
        "test_transfer.py::test_a_stale_post_raises_and_the_peer_sees_only_what_the_holders_posted[forward]",
        ("W28",),
    ),
    Mutation(
        "lose in transfer",
        "What is queued moves with the port, whole.",
        "_overflow.py",
        "        self._memory.offset = self._at\n",
        "        self._memory.offset = self._ends[-1]\n",
        "test_transfer.py::test_a_port_bounces_with_a_partly_read_queue[forward-3000-1]",
    ),
    Mutation(
        "double in transfer",
        "What was taken before a transfer does not come again behind it.",
        "_link.py",
        "            self._inbox.rewind()\n",
        "",
        "test_transfer.py::test_a_port_bounces_with_a_partly_read_queue[forward-3000-1]",
    ),
    Mutation(
        "lose the undeliverable",
        "A port in a message that nobody will receive is closed, as undeliverable.",
        "_link.py",
        "            bounce(unread(sock, described))\n",
        "            deque(unread(sock, described), 0)\n",
        "test_transfer.py::test_ports_in_unread_messages_close_with_the_port_that_held_them"
        "[unread-close-in the socket]",
    ),
    Mutation(
        "overtake",
        "The close comes behind every message.",
        "_link.py",
        "        if not inbox.left and not inbox.exhausted(",
        "        if not inbox.left and not hung_up(sock) and not inbox.exhausted(",
        "test_close.py::test_close_comes_after_the_last_message_however_full_the_socket_is",
        ("N49", "N54"),
    ),
    Mutation(
        "cut off",
        "What was posted before its sender died is received, although that had unread messages.",
        "_link.py",
        "            return self._look(hand)\n",
        '            return End("died", self.peer_pid)\n',
        "test_close.py::test_a_death_between_the_look_at_a_packet_and_its_taking_loses_nothing[port]",
    ),
    Mutation(
        "close twice",
        "There is one close event.",
        "_endpoint.py",
        "            if dispatch:\n                self._dispatch_close(row)\n",
        "            if dispatch:\n                self._dispatch_close(row)\n"
        "                at.call(partial(self._dispatch_close, row))\n",
        "test_close.py::test_an_end_that_is_closed_and_then_collected_is_one_close[forward]",
        ("X33",),
    ),
    Mutation(
        "close oneself",
        "There is no close event at the end that was closed itself.",
        "_endpoint.py",
        '        self._link.close("closed")\n        self._tell_closing()\n',
        '        self._link.close("closed")\n        self._tell_closing()\n'
        '        self._state = State.OPEN\n        self._over(End("closed", None))\n',
        "test_close.py::test_close_does_not_fire_at_the_end_that_was_closed[forward]",
        ("W45",),
    ),
    Mutation(
        "wrong reason",
        "The close event of a process that was killed says that it died.",
        "_link.py",
        '            return End("died", self.peer_pid)\n',
        '            return End("exited", self.peer_pid)\n',
        "test_close.py::test_the_end_of_a_process_is_told_with_reason_process_and_exit_code[fork-SIGKILL]",
        ("W48", "H11"),
    ),
    Mutation(
        "listen to the closed",
        "No handler runs for what is queued at an end that closes itself.",
        "_endpoint.py",
        "        return self._state is State.OPEN\n\n    def _listeners_changed(",
        "        if self._state is not State.OPEN:\n"
        "            self._dispatch(event, row, at.report)\n"
        "        return self._state is State.OPEN\n\n    def _listeners_changed(",
        "test_close.py::test_closing_in_the_first_handler_drops_the_second_message[forward]",
        ("W10",),
    ),
    Mutation(
        "accept when closed",
        "Posting to a channel that is closed returns False.",
        "_end.py",
        "                self._send(data, SEND_NOW)\n            except GONE:\n                return False\n",
        "                self._send(data, SEND_NOW)\n            except GONE:\n                return True\n",
        "test_close.py::test_post_message_tells_whether_the_channel_was_open[forward]",
        ("X21", "E19"),
    ),
    Mutation(
        "take from nobody",
        "A started port that nobody listens to keeps its messages.",
        "_endpoint.py",
        "link.take(hand) if row else self._take_if_over(hand)",
        "link.take(hand)",
        "test_close.py::test_close_waits_behind_the_messages_of_a_started_port_that_nobody_listens_to[forward]",
        ("N49", "N54"),
    ),
    Mutation(
        "buffer nothing",
        "buffered_amount is 0 only if all was taken.",
        "_end.py",
        "        waiting = 0 if sock is None else queued(sock)\n        if not waiting:\n",
        "        waiting = 0 if sock is None else queued(sock)\n        if waiting < 2000:\n",
        "test_posting.py::test_buffered_amount_is_zero_until_a_message_waits_and_after_it_was_taken[1]",
    ),
    Mutation(
        "buffer for ever",
        "buffered_amount is 0 if all was taken.",
        "_end.py",
        "            self._bodies = 0\n            return 0\n",
        "            return self._bodies\n",
        "test_posting.py::test_buffered_amount_is_zero_until_a_message_waits_and_after_it_was_taken[3145728]",
    ),
    Mutation(
        "leak",
        "A channel that is over holds no descriptor.",
        "_link.py",
        "                self._release(_refuse_posts, error)\n                self._drop_received()\n",
        "                self._release(_refuse_posts, error)\n                self._drop_received()\n"
        "                os.dup(sock.fileno())\n",
        "test_collection.py::test_a_thousand_channels_leave_nothing",
    ),
    Mutation(
        "hold in the child",
        "A forked child holds no end that it was not given, so the end of its holder is told at once.",
        "_link.py",
        "    inherited = open_links()\n    _links.clear()\n",
        "    inherited = []\n",
        "test_forks.py::test_a_raw_child_holds_no_socket_of_its_parents_channels",
    ),
    Mutation(
        "lose to an interrupt",
        "Ctrl-C in receive() loses no message.",
        "_link.py",
        "                    back.append(taken)\n",
        "",
        "test_signals.py::test_a_storm_of_interrupts_on_a_receive_loop_loses_and_doubles_nothing[recv]",
    ),
)


def replaced(mutation: Mutation) -> str:
    """The mutated file. ``ValueError`` if the old text is not there exactly once."""
    text = (PROJECT / "mpchannel" / mutation.file).read_text()
    count = text.count(mutation.old)
    if count != 1:
        raise ValueError(f"{mutation.name}: what it replaces is {count} times in {mutation.file}: {mutation.old!r}")
    return text.replace(mutation.old, mutation.new)


@contextmanager
def copied(mutation: Mutation | None) -> Iterator[Path]:
    """A copy of the project, mutated or not."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder = Path(name)
        for part in ("mpchannel", "tests"):
            shutil.copytree(PROJECT / part, folder / part)  # with what is compiled, which stays valid
        shutil.copy(PROJECT / "pyproject.toml", folder)
        if mutation is not None:
            (folder / "mpchannel" / mutation.file).write_text(replaced(mutation))
        yield folder


def run(mutation: Mutation | None, tests: Sequence[str]) -> tuple[bool, str]:
    """Run *tests* on a copy. Whether all passed, and what pytest said. ``RuntimeError`` if it could not run them."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    timeout = 60 if mutation is None else HANG
    with copied(mutation) as folder:
        options = ["-q", "-s", f"--timeout={timeout}", f"--basetemp={folder}/base"]
        options += ["-p", "no:cacheprovider", "-p", "no:xdist"]
        if mutation is not None:
            options += ["-p", "tests.mutations"]
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *(f"tests/{each}" for each in tests)],
            cwd=folder,
            env=environment | {"PYTHONPATH": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    if ended.returncode not in (0, 1):  # 2 and more: pytest found no such test, or could not load it
        raise RuntimeError(f"pytest ended with {ended.returncode}:\n{ended.stdout}")
    return not ended.returncode, ended.stdout


def marked_rows() -> dict[str, tuple[str, ...]]:
    """The rows that each test is marked with, by its id without parameters."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_"):
                found[f"{path.name}::{node.name}"] = tuple(
                    argument.value
                    for mark in node.decorator_list
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.row"
                    for argument in mark.args
                    if isinstance(argument, ast.Constant)
                )
    return found


def pytest_runtest_logreport(report: Any) -> None:
    """A hook: this module is a plugin of the pytest that tests a mutation."""
    if report.when == "call" and report.failed:
        # Enough is known. The guard of the tests would wait in vain for what a failed one holds in its traceback.
        print(report.longreprtext, f"\nCAUGHT {report.longrepr.reprcrash.message}", sep="\n", flush=True)
        os._exit(1)


def how_it_failed(output: str) -> str:
    """The line of pytest's output that says it."""
    for line in output.splitlines():
        if line.startswith("CAUGHT "):
            return line.removeprefix("CAUGHT ")
    return "it waits for ever" if "Timeout" in output else "it left something behind"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="of the mutations; default: all")
    names = parser.parse_args(arguments).names
    chosen = [each for each in MUTATIONS if not names or each.name in names]
    unknown = set(names) - {each.name for each in chosen}
    if unknown:
        parser.error(f"there is no mutation {', '.join(sorted(unknown))}")
    passed, output = run(None, sorted({each.test for each in chosen}))
    if not passed:
        print(output)
        return 2
    survived = []
    print("| promise | mutation | caught by | rows | how |\n|---|---|---|---|---|")
    for mutation in chosen:
        passed, output = run(mutation, [mutation.test])
        if passed:
            survived.append(mutation.name)
        how = "NOT CAUGHT" if passed else how_it_failed(output)[:100]
        cells = (mutation.promise, mutation.name, f"`{mutation.test}`", ", ".join(mutation.rows) or "-", how)
        print("|", " | ".join(each.replace("|", "\\|") for each in cells), "|", flush=True)
    print(f"\n{len(chosen) - len(survived)} of {len(chosen)} mutations caught")
    if not names:
        rows: dict[str, int] = {}
        for marked in marked_rows().values():
            for row in marked:
                rows[row] = rows.get(row, 0) + 1
        print(f"\n{len(rows)} rows of the behaviour tables have tests (row: how many):")
        print(" ".join(f"{row}: {rows[row]}" for row in sorted(rows)))
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
