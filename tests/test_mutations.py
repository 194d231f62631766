"""The tests notice it when a promise is broken."""

from __future__ import annotations

import ast

import pytest

from . import mutations
from .mutations import MUTATIONS, Mutation

pytestmark = pytest.mark.once

each_mutation = pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.name.replace(" ", "-"))


def test_the_tests_that_catch_mutations_pass_when_nothing_is_broken() -> None:
    passed, output = mutations.run(None, sorted({each.test for each in MUTATIONS}))
    assert passed, output


@each_mutation
def test_a_broken_promise_is_caught_by_the_test_that_is_named_with_it(mutation: Mutation) -> None:
    passed, output = mutations.run(mutation, [mutation.test])
    assert not passed, output


@each_mutation
def test_a_mutation_is_a_program_and_names_the_rows_of_its_test(mutation: Mutation) -> None:
    mutated = mutations.replaced(mutation)
    ast.parse(mutated)
    assert mutations.marked_rows()[mutation.test.partition("[")[0]] == mutation.rows


def test_mutations_break_at_least_ten_promises() -> None:
    assert len({each.promise for each in MUTATIONS}) == len({each.name for each in MUTATIONS}) >= 10


def test_a_mutation_whose_place_is_gone_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 times"):
        mutations.replaced(Mutation("rotten", "", "_end.py", "there is no such line", "", ""))
