"""Packets by chance: the corpus of ``fuzz_packets``, and mutations of it, find nothing."""

from __future__ import annotations

from collections import Counter

import pytest

from . import fuzz_packets

pytestmark = pytest.mark.once


@pytest.mark.parametrize("name", fuzz_packets.corpus())
def test_the_corpus_finds_nothing(name: str) -> None:
    with fuzz_packets.no_pickle_loaded():
        fuzz_packets.run_input(fuzz_packets.corpus()[name])


def test_2000_mutations_of_the_corpus_find_nothing_and_come_to_every_outcome() -> None:
    outcomes: Counter[str] = Counter()
    with fuzz_packets.no_pickle_loaded():
        for data in fuzz_packets.mutations(2000):
            try:
                outcomes |= fuzz_packets.run_input(data)
            except BaseException as error:
                raise AssertionError(f"found by {data!r}") from error
    assert min(outcomes["message"], outcomes["bad"], outcomes["port"]) > 0
    for words in ("an empty packet", "never written", "not what it should be", "of no known kind"):
        assert any(words in outcome for outcome in outcomes), words


def test_the_corpus_is_what_its_seeds_are_and_what_was_found() -> None:
    inputs, seeds = fuzz_packets.corpus(), fuzz_packets.seeds()
    assert seeds.keys() <= inputs.keys()
    with fuzz_packets.no_pickle_loaded():
        for name, data in seeds.items():
            assert fuzz_packets.run_input(data).keys() == fuzz_packets.run_input(inputs[name]).keys(), name
