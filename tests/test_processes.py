"""Ports that move into other processes."""

from __future__ import annotations

import os
from typing import Any

import pytest

import mpchannel

from . import children


@pytest.mark.row("E04", "W46", "E41")
def test_a_port_given_to_a_process_answers_and_messages_from_before_its_start_arrive(context: Any) -> None:
    ours, theirs = mpchannel.MessageChannel()
    ours.post_message("posted before the start")
    process = context.Process(target=children.echo, args=(theirs,))
    process.start()
    ours.post_message("posted after the start")
    assert [ours.recv(20), ours.recv(20)] == ["posted before the start", "posted after the start"]
    ours.close()
    process.join(20)
    assert process.exitcode == 0


@pytest.mark.row("N41")
def test_the_parents_port_is_detached_when_start_returned(context: Any) -> None:
    ours, theirs = mpchannel.MessageChannel()
    process = context.Process(target=children.echo, args=(theirs,), name="the-echo")
    process.start()
    assert theirs.detached
    with pytest.raises(
        mpchannel.PortDetachedError, match=rf"given to 'the-echo', pid {process.pid}, at .*{os.path.basename(__file__)}"
    ):
        theirs.post_message("too late")
    ours.close()
    process.join(20)
