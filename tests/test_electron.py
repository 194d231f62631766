"""The conversations of Electron's main process, renderers and utility processes, and of Node's workers: with workers,
at either side, under every start method; and two hundred workers that are ended in every way."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest

import mpchannel
from mpchannel import MessageChannel, Worker

from . import electron_workers as roles
from .children import running, script_environment
from .electron_workers import FULL, REPETITIONS, VALUES
from .test_worker import ending


@pytest.fixture(params=("worker", "parent"))
def played(request: pytest.FixtureRequest, context: Any) -> Callable[..., tuple[Any, Any]]:
    """Play two roles against each other, the second in a worker; or the first there and the second here. Gives what
    each saw."""

    def play(first: Callable[..., Any], second: Callable[..., Any], *of_first: Any) -> tuple[Any, Any]:
        seen, result = MessageChannel()
        with seen:
            if request.param == "worker":
                with ending(Worker(roles.play, second, result, context=context)) as worker:
                    return first(worker, *of_first), seen.recv(20)
            with ending(Worker(roles.play, first, result, *of_first, context=context)) as worker:
                here = second(worker)
                return seen.recv(20), here

    return play


Played = Callable[..., tuple[Any, Any]]


# Ports and messages from one side to the other


@pytest.mark.row("E01")
def test_a_message_and_its_one_port_arrive_and_the_port_works(played: Played) -> None:
    answer, arrived = played(roles.post_hi_and_a_port, roles.describe_and_answer)
    assert arrived == ("hi", [mpchannel.MessagePort])
    assert answer == "alive"


@pytest.mark.row("E02")
def test_without_a_list_the_ports_are_empty_however_the_message_is_taken(played: Played) -> None:
    _, arrived = played(roles.post_without_a_list, roles.ports_of_messages)
    assert arrived == (("received", ()), ("heard", ()))


@pytest.mark.row("E03", "E14", "E20", "E22", "E26", "N42")
@pytest.mark.parametrize("what", roles.REFUSED)
def test_what_is_refused_is_told_to_the_sender_and_the_port_beside_it_stays(played: Played, what: str) -> None:
    told, arrived = played(roles.post_what_is_refused_then_the_port, roles.describe_and_answer, what)
    assert told == (True, "alive")
    assert arrived == ("good", [mpchannel.MessagePort])


@pytest.mark.row("N42")
def test_a_port_in_the_data_of_a_worker_must_be_listed(channel: Any, context: Any) -> None:
    mine, theirs = channel
    with pytest.raises(mpchannel.DataCloneError, match="not in the transfer list"):
        Worker(roles.look_away, data={"port": theirs}, context=context)
    theirs.post_message("unharmed")
    assert mine.recv(5) == "unharmed"


@pytest.mark.row("E04")
def test_who_received_a_port_posts_42_and_gets_84(played: Played) -> None:
    reason, answer = played(roles.keep_a_doubling_end, roles.start_and_post_42)
    assert (answer, reason) == (84, "closed")


@pytest.mark.row("N14")
def test_a_port_in_the_message_and_in_the_list_answers_whoever_made_it(played: Played) -> None:
    answer, is_the_listed = played(roles.give_a_port_in_a_dict, roles.answer_on_the_port_in_the_dict)
    assert answer == "directly"
    assert is_the_listed == [True]


@pytest.mark.row("E06")
def test_a_port_goes_from_one_worker_through_the_parent_to_another(context: Any) -> None:
    seen, result = MessageChannel()
    with (
        ending(Worker(roles.play, roles.post_hi_and_a_port, result, context=context)) as first,
        ending(Worker(roles.post_pid_on_a_given_port, context=context)) as second,
    ):
        event = first.receive(20)
        second.post_message(event.data, event.ports)
        assert seen.recv(20) == second.pid
    seen.close()


@pytest.mark.row("E52")
def test_the_ports_of_an_event_are_passed_on_as_they_came(context: Any) -> None:
    onward, source = MessageChannel()
    channels = [MessageChannel() for _ in range(3)]
    with (
        ending(Worker(roles.relay, onward, context=context)) as first,
        ending(Worker(roles.post_place_on_each, source, context=context)) as second,
    ):
        first.post_message("passed on", [each.port2 for each in channels])
        assert [each.port1.recv(20) for each in channels] == [
            ("passed on", 0, second.pid),
            ("passed on", 1, second.pid),
            ("passed on", 2, second.pid),
        ]
        first.post_message("not for the once listener that is gone")
    for each in channels:
        each.port1.close()


@pytest.mark.row("E16")
def test_what_was_posted_before_the_transfer_is_heard_behind_it(played: Played) -> None:
    _, message = played(roles.post_earlier_than_the_transfer, roles.set_onmessage)
    assert message == "earlier"


@pytest.mark.row("E17")
def test_a_queue_with_a_port_in_it_moves_and_is_unwrapped(played: Played) -> None:
    _, message = played(roles.nest_a_port_in_a_queue, roles.unwrap)
    assert message == "data"


@pytest.mark.row("N53")
def test_a_port_comes_through_another_that_came_and_both_close_in_order(played: Played) -> None:
    seen, _ = played(roles.post_through_a_base, roles.answer_on_the_inner_port)
    assert seen == ("through the inner channel", "closed", "closed")


@pytest.mark.row("E12")
def test_all_values_arrive_as_they_are(played: Played) -> None:
    _, arrived = played(roles.post_values, roles.take_values)
    assert arrived == VALUES


@pytest.mark.row("E12", "X36")
def test_values_are_accepted_although_nobody_receives(played: Played) -> None:
    accepted, reason = played(roles.post_values, roles.look_at_nothing)
    assert accepted == [True] * len(VALUES)
    assert reason == "closed"


@pytest.mark.row("E40", "N44")
def test_parent_and_worker_have_a_port_to_each_other_from_the_start(played: Played) -> None:
    answer, _ = played(roles.ask_for_twice_2, roles.double)
    assert answer == 4


@pytest.mark.row("E41")
def test_messages_from_before_the_worker_is_up_wait_for_its_listener(context: Any) -> None:
    seen, result = MessageChannel()
    gate, theirs = MessageChannel()
    with ending(Worker(roles.play, roles.listen_late, result, theirs, context=context)) as worker:
        roles.post_three(worker, gate)
        assert seen.recv(20) == ["first", "second", "third"]
    gate.close()
    seen.close()


@pytest.mark.row("E41")
def test_messages_from_before_anybody_listens_to_the_worker_wait_for_that(context: Any) -> None:
    seen, result = MessageChannel()
    gate, theirs = MessageChannel()
    with ending(Worker(roles.play, roles.post_three, result, theirs, context=context)) as worker:
        assert roles.listen_late(worker, gate) == ["first", "second", "third"]
    gate.close()
    seen.close()


@pytest.mark.row("E46")
def test_messages_are_queued_until_the_start_and_the_close_is_behind_them(played: Played) -> None:
    _, seen = played(roles.post_and_close, roles.listen_and_start_later)
    assert seen == (0, ("message", "queued", ()), ("close", "closed"))


@pytest.mark.row("E47")
def test_the_replies_to_a_request_are_a_stream_and_then_one_close(played: Played) -> None:
    seen, _ = played(roles.request_streams, roles.stream_replies)
    assert seen == [(True, "closed", 0)] * 3


@pytest.mark.row("N26")
def test_one_once_after_the_other_misses_neither_the_first_nor_the_last_message(played: Played) -> None:
    count, _ = played(roles.await_one_at_a_time, roles.post_first_and_last_and_close)
    assert count == REPETITIONS


@pytest.mark.row("N37")
def test_what_cannot_be_loaded_is_a_messageerror_and_the_next_message_is_fine(played: Played) -> None:
    _, seen = played(roles.post_what_cannot_be_loaded, roles.hear_what_cannot_be_loaded)
    assert seen == [("messageerror", None, ()), ("message", "good", ())]


# How one side sees the other's end


@pytest.mark.row("E07")
def test_a_close_right_behind_the_transfer_is_heard(played: Played) -> None:
    _, reason = played(roles.close_at_once, roles.hear_close)
    assert reason == "closed"


@pytest.mark.row("E08")
def test_a_port_that_the_other_side_lets_go_of_is_collected_and_closes(played: Played) -> None:
    (reason, more), _ = played(roles.hear_one_close, roles.let_go)
    assert (reason, more) == ("collected", 0)


@pytest.mark.row("E28")
def test_the_close_is_heard_once_and_only_where_it_was_not_called(played: Played) -> None:
    there, here = played(roles.hear_one_close, roles.close_with_a_listener)
    assert there == ("closed", 0)
    assert here == 0


@pytest.mark.row("E18")
def test_what_is_posted_on_a_port_after_its_close_reaches_nobody(played: Played) -> None:
    accepted, arrived = played(roles.close_and_post, roles.all_messages)
    assert accepted is False
    assert arrived == ["before"]


@pytest.mark.row("E19")
def test_posting_to_an_end_that_was_closed_is_silent_and_its_listener_does_not_run(played: Played) -> None:
    seen, heard = played(roles.post_to_a_closed_end, roles.listen_and_close)
    assert seen == ("closed", False)
    assert heard == 0


@pytest.mark.row("E23")
def test_a_listening_port_that_nobody_refers_to_still_hears(played: Played) -> None:
    _, message = played(roles.post_to_one_that_forgot, roles.listen_and_forget)
    assert message == "still there?"


@pytest.mark.row("E29")
def test_starting_and_closing_twice_is_doing_so_once(played: Played) -> None:
    there, here = played(roles.post_and_hear_one_close, roles.start_and_close_twice)
    assert there == ("closed", 0)
    assert here == ("once", 0)


# Several ports, several workers


@pytest.mark.row("N41")
def test_ports_given_to_a_worker_work_there_and_are_detached_here(context: Any) -> None:
    channels = [MessageChannel() for _ in range(4)]
    given = [each.port2 for each in channels]
    with ending(
        Worker(roles.answer_each_with_its_place, *given[:2], data=given[2:], transfer=given[2:], context=context)
    ) as worker:
        for port in given:
            with pytest.raises(mpchannel.PortDetachedError):
                port.post_message("too late")
        for place, each in enumerate(channels):
            each.port1.post_message(f"message {place}")
            assert each.port1.recv(20) == (place, f"message {place}", worker.pid)
            each.port1.close()


@pytest.mark.row("X18")
def test_workers_with_a_port_each_answer_for_themselves(context: Any) -> None:
    channels = [MessageChannel() for _ in range(2)]
    with (
        ending(Worker(roles.answer_each_with_its_place, channels[0].port2, context=context)) as first,
        ending(Worker(roles.answer_each_with_its_place, channels[1].port2, context=context)) as second,
    ):
        for each, worker in zip(channels, (first, second), strict=True):
            each.port1.post_message(worker.name)
        for each, worker in zip(channels, (first, second), strict=True):
            assert each.port1.recv(20) == (0, worker.name, worker.pid)
            each.port1.close()


@pytest.mark.row("X18")
@pytest.mark.parametrize("start", [FULL, FULL + 1], ids=("the first ends it", "the second ends it"))
def test_two_workers_talk_to_each_other_without_the_parent(context: Any, start: int) -> None:
    one, other = MessageChannel()
    reports = [MessageChannel() for _ in range(2)]
    one.post_message(start)  # for the second
    with (
        ending(Worker(roles.count_down, reports[0].port2, one, context=context)),
        ending(Worker(roles.count_down, reports[1].port2, other, context=context)) as second,
    ):
        if start % 2:
            assert list(reports[1].port1) == []
        else:
            assert list(reports[1].port1) == [second.pid]
    for each in reports:
        each.port1.close()


@pytest.mark.row("X36")
def test_a_port_that_a_worker_ignores_does_not_keep_the_programs_from_ending(start_method: str) -> None:
    done = program(
        """
        import mpchannel
        from tests import electron_workers

        if __name__ == "__main__":
            mpchannel.set_start_method(sys.argv[1])
            mine, theirs = mpchannel.MessageChannel()
            worker = mpchannel.Worker(electron_workers.look_away, theirs)
            for number in range(10):
                mine.post_message(number)
                worker.post_message(number)
            print(mine.wait_closed(20).reason, worker.join(20), worker.exitcode)
        """,
        start_method,
    )
    assert done == "exited None 0\n"


# What keeps a worker alive


@pytest.mark.row("N45")
def test_a_worker_ends_when_its_handler_is_cleared(context: Any) -> None:
    with ending(Worker(roles.listen_until_told, context=context)) as worker:
        worker.post_message("heard")
        assert worker.recv(20) == "heard"
        worker.post_message("clear")


@pytest.mark.row("N45")
def test_what_cannot_be_called_is_refused_and_the_handler_stays(context: Any) -> None:
    with ending(Worker(roles.assign_what_cannot_be_called, context=context)) as worker:
        with pytest.raises(TypeError, match="callable"):
            worker.onmessage = 3  # type: ignore[assignment]
        assert worker.recv(20) == "refused"
        worker.post_message("heard")
        assert worker.recv(20) == "heard"
        worker.post_message("clear")


@pytest.mark.row("N45")
def test_messages_of_a_worker_wait_while_its_handler_is_cleared(context: Any) -> None:
    with ending(Worker(roles.listen_until_told, context=context)) as worker:
        worker.onmessage = print
        worker.onmessage = None
        worker.post_message("waits")
        assert worker.recv(20) == "waits"
        worker.post_message("clear")


@pytest.mark.row("N46")
@pytest.mark.parametrize("how", roles.RELEASED)
def test_a_port_that_holds_no_reference_lets_its_worker_end(context: Any, channel: Any, how: str) -> None:
    _, theirs = channel
    with ending(Worker(roles.hold_and_return, how, theirs, context=context)) as worker:
        assert worker.recv(20) == "returning"


@pytest.mark.row("N46", "N48")
@pytest.mark.parametrize("ref_again", [False, True])
def test_a_listening_port_keeps_its_worker_through_idleness_until_unref(
    context: Any, channel: Any, ref_again: bool
) -> None:
    mine, theirs = channel
    with ending(Worker(roles.listen_where_told, theirs, ref_again, context=context)) as worker:
        assert worker.recv(20) == "returning"
        worker.join(1)
        assert worker.exitcode is None
        mine.post_message("work")
        assert mine.recv(20) == ("work", True)
        mine.post_message("unref")
        assert mine.recv(20) == ("unref", False)


@pytest.mark.row("N46")
def test_the_close_of_the_other_end_lets_a_worker_end(context: Any, channel: Any) -> None:
    mine, theirs = channel
    with ending(Worker(roles.listen_where_told, theirs, context=context)) as worker:
        assert worker.recv(20) == "returning"
        mine.close()


@pytest.mark.row("N48")
def test_a_process_that_waits_for_the_close_hears_work_that_comes_late(context: Any, channel: Any) -> None:
    mine, theirs = channel
    with running(context.Process(target=roles.listen_in_a_process, args=(theirs, True))) as process:
        process.join(1)
        assert process.exitcode is None
        mine.post_message("work")
        assert mine.recv(20) == "work"
        mine.close()


@pytest.mark.row("N48")
def test_a_listener_does_not_keep_a_plain_process_alive(context: Any, channel: Any) -> None:
    mine, theirs = channel
    with running(context.Process(target=roles.listen_in_a_process, args=(theirs, False))):
        assert mine.wait_closed(20).reason == "exited"


# Teardowns

TEARDOWNS = """
    import contextlib, gc, multiprocessing, os, random, signal, threading, time
    import mpchannel
    from tests import electron_workers as roles

    KINDS = [roles.sit_idle, roles.be_busy, roles.have_a_worker, roles.flood, roles.end_at_once, roles.leave_unread]

    def stop(worker):
        worker.post_message("stop")
        worker.join(20)
        return [0]

    def terminate(worker):
        worker.terminate()
        worker.join(20)
        return [0, -signal.SIGTERM]  # 0: it was over already

    def kill(worker):
        with contextlib.suppress(ProcessLookupError):  # it was over, and reaped
            os.kill(worker.pid, signal.SIGKILL)
        worker.join(20)
        return [0, -signal.SIGKILL]

    def leave(worker):
        with worker:
            pass
        return [0, -signal.SIGTERM]

    def belongings():
        return sorted(os.listdir("/proc/self/fd")), sorted(each.name for each in threading.enumerate())

    def settle(what, expected):
        deadline = time.monotonic() + 10
        while what() != expected:
            assert time.monotonic() < deadline, (what(), expected)
            time.sleep(0.01)
            gc.collect()

    def main(method, seed, count):
        mpchannel.set_start_method(method)
        dice = random.Random(seed)
        told = []

        def start(kind):
            worker = mpchannel.Worker(kind)
            if dice.random() < 0.5:
                listened.append(worker.pid)
                worker.onexit = lambda event, pid=worker.pid: told.append(pid)
            return worker

        listened = []
        worker = mpchannel.Worker(roles.have_a_worker)  # starts what lives as long as the program
        worker.onexit = lambda event: None
        worker.recv(20)
        stop(worker)
        del worker
        settle(multiprocessing.active_children, [])
        gc.collect()
        before = belongings()

        left = [dice.choice(KINDS) for _ in range(count)]
        at_work = []
        while left or at_work:
            if left and len(at_work) < 6 and (len(at_work) < 3 or dice.random() < 0.5):
                at_work.append(start(left.pop()))
                continue
            worker = at_work.pop(dice.randrange(len(at_work)))
            if dice.random() < 0.7:
                worker.recv(20)  # it is at it
            way = dice.choice([stop, terminate, kill, leave, None])
            if way is None:
                worker.post_message("stop")  # and forget it
            else:
                codes = way(worker)
                assert worker.exitcode in codes, (worker, way)
            del worker
            gc.collect()
        settle(multiprocessing.active_children, [])
        settle(belongings, before)
        settle(lambda: sorted(told), sorted(listened))
        print("clean")

        running = [start(kind) for kind in KINDS]
        for worker in running[::2]:
            worker.recv(20)
        del worker, running[1:4]  # and the program ends

    if __name__ == "__main__":
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
"""


def test_two_hundred_teardowns_in_random_order(start_method: str) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    assert program(TEARDOWNS, start_method, str(seed), "67") == "clean\n"


def program(script: str, *arguments: str) -> str:
    """The output of a program of its own, which ends in order and without a word on stderr, and leaves no process."""
    token = str(uuid.uuid4())
    with subprocess.Popen(
        [sys.executable, "-W", "always", "-c", "import sys\n" + textwrap.dedent(script), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**script_environment(), "MPCHANNEL_TEST": token},
        start_new_session=True,
    ) as done:
        try:
            output, errors = done.communicate(timeout=90)
            assert not errors, errors
            assert done.returncode == 0
            deadline = time.monotonic() + 5
            while left := _processes_with(token):
                assert time.monotonic() < deadline, f"left: {left}"
                time.sleep(0.01)
        finally:
            done.kill()
            for pid in _processes_with(token):
                os.kill(pid, signal.SIGKILL)
    return output


def _processes_with(token: str) -> dict[int, str]:
    """Those that have a *token* of ours in their environment, however they descend, and their command lines."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if f"MPCHANNEL_TEST={token}".encode() not in file.read().split(b"\0"):
                    continue
            with open(f"/proc/{name}/cmdline", "rb") as file:
                found[int(name)] = file.read().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it has ended, or is somebody else's
    return found
