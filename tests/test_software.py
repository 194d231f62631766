"""Programs that use multiprocessing's pipes, unchanged, with mpchannel in its place; where they are installed."""

from __future__ import annotations

import os
import pickle
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest

import mpchannel

from . import children
from .children import running

# Vectors of environments (reinforcement learning): a pipe to each worker


@pytest.mark.leaves("the heap of shared ctypes, where observations are")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # theirs
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("shared_memory", [True, False])
def test_gymnasiums_vector_environment(start_method: str, shared_memory: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gymnasium = pytest.importorskip("gymnasium")
    module = pytest.importorskip("gymnasium.vector.async_vector_env")
    monkeypatch.setattr(module, "multiprocessing", mpchannel)
    makers = [lambda: gymnasium.make("CartPole-v1") for _ in range(3)]
    vector = module.AsyncVectorEnv(makers, shared_memory=shared_memory, context=start_method)
    assert isinstance(vector.parent_pipes[0], mpchannel.connection.Connection)
    reference = gymnasium.vector.SyncVectorEnv(makers)
    observations, _ = vector.reset(seed=5)
    expected, _ = reference.reset(seed=5)
    assert np.array_equal(observations, expected)
    for number in range(50):
        actions = np.array([number % 2, 1, 0])
        for one, other in zip(vector.step(actions)[:4], reference.step(actions)[:4], strict=True):
            assert np.array_equal(one, other)
    assert vector.call("render_mode") == (None, None, None)
    vector.close()
    reference.close()


def vector_worker(remote: Any, parent_remote: Any, make: Any) -> None:
    """As the workers of vector environments of the stable-baselines kind are written."""
    parent_remote.close()
    value = make()
    try:
        while True:
            command, data = remote.recv()
            if command == "step":
                value += data
                remote.send((value, os.getpid()))
            else:
                remote.close()
                break
    except KeyboardInterrupt:
        pass


def test_a_vector_environment_whose_workers_close_the_parents_end(context: Any) -> None:
    remotes, work_remotes = zip(*[context.Pipe() for _ in range(3)], strict=True)
    processes = []
    for work_remote, remote in zip(work_remotes, remotes, strict=True):
        process = context.Process(target=vector_worker, args=(work_remote, remote, lambda: 0), daemon=True)
        process.start()
        processes.append(process)
        work_remote.close()
    for number in range(100):
        for remote in remotes:
            remote.send(("step", number))
        answers = [remote.recv() for remote in remotes]
        assert [pid for _, pid in answers] == [process.pid for process in processes]
    processes[0].kill()
    with pytest.raises(EOFError):
        remotes[0].recv()
    for remote in remotes[1:]:
        remote.send(("close", None))
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [-9, 0, 0]
    for remote in remotes:
        remote.close()


# Pools


def test_pebbles_pool(context: Any) -> None:
    pebble = pytest.importorskip("pebble")
    with pebble.ProcessPool(max_workers=2, context=context) as pool:
        futures = [pool.schedule(children.identity, args=[(number, bytes(number * 1000))]) for number in range(100)]
        assert [future.result(60)[0] for future in futures] == list(range(100))
        late = pool.schedule(time.sleep, args=[60], timeout=0.3)
        with pytest.raises(TimeoutError):
            late.result(30)
        near, far = mpchannel.MessageChannel()
        died = pool.schedule(children.exit_when_told, args=[far, 3])
        while not died.running():  # pebble gives the whole pool up if its worker ends before it has heard of the task
            time.sleep(0.01)
        near.post_message("now")
        near.close()
        with pytest.raises(pebble.ProcessExpired):
            died.result(30)
        assert pool.schedule(children.identity, args=["goes on"]).result(30) == "goes on"


def test_an_executor_with_our_context(context: Any) -> None:
    with ProcessPoolExecutor(2, mp_context=context) as executor:
        assert list(executor.map(children.identity, range(200), chunksize=7)) == list(range(200))


def test_a_pool_over_connections_as_joblib_writes_it(context: Any) -> None:
    one, other = context.Pipe()
    with running(context.Process(target=children.echo_until_eof, args=(other,))):
        other.close()
        one.send_bytes(pickle.dumps({"task": 1}))
        assert pickle.loads(one.recv_bytes()) == {"task": 1}
        one.close()
