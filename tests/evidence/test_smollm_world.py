"""The made-up worlds of the experiment on SmolLM2: who is in them, what is written, and what is asked."""

from __future__ import annotations

import random
import re
from itertools import permutations

import pytest

from experiments.past_smollm import world as the_world
from experiments.past_smollm.world import (
    ANSWERS,
    COUNTRY_OF,
    HELD_OUT,
    QUESTIONS,
    RELATIONS,
    STATEMENTS,
    VALUES,
    Question,
    World,
    answer,
    completions,
    document,
    held_out,
    questions,
    two_hops,
)

WORLDS = [World.of(number) for number in (1, 2, 3)]


@pytest.mark.parametrize("world", WORLDS)
def test_no_two_people_share_a_name(world: World) -> None:
    names = [person.name for person in (*world.source, *world.target)]
    assert len(names) == 80
    for part in zip(*(name.split() for name in names), strict=True):
        assert len(set(part)) == 80  # not a given name, not a family name


def test_a_world_is_the_same_again_and_its_number_makes_it_another() -> None:
    assert World.of(1) == WORLDS[0]
    assert len({world.target[0].name for world in WORLDS}) == 3


def test_values_of_a_relation_are_distinct_and_none_contains_another() -> None:
    for relation, values in VALUES.items():
        assert len(values) == len(set(values)) == 16, relation
        text = " ".join(values)
        assert Question("", values[0], values).named(text) == set(values)
        for value in values:
            assert Question("", value, values).named(f"The {value}.") == {value}
    for one, other in permutations(RELATIONS, 2):
        assert not set(VALUES[one]) & set(VALUES[other])


def test_statements_do_not_begin_as_those_of_another_relation_do() -> None:
    """Else nobody could know which value completes one."""
    for one, other in permutations(RELATIONS, 2):
        for statement in STATEMENTS[one]:
            begin, end = statement.split("{v}")
            assert "{n}" in begin
            assert "{n}" not in end
            assert not [way for way in STATEMENTS[other] if way.startswith(begin)]


@pytest.mark.parametrize("world", WORLDS)
def test_documents_state_every_fact_of_their_person_and_no_other(world: World) -> None:
    generator = random.Random(5)
    for person in world.target:
        texts = [document(person, generator) for _ in range(40)]
        for relation in RELATIONS:
            named = set().union(*(Question("", "", VALUES[relation]).named(text) for text in texts))
            assert named == {person.facts[relation]}
        counts = {text.count(person.name) for text in texts}
        assert counts == {1, 2, 3}  # a statement names its person once


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("side", ["source", "target"])
def test_questions_are_about_their_own_people_and_facts(world: World, side: str) -> None:
    people = getattr(world, side)
    asked = questions(people)
    assert len({item.text for item in asked}) == len(asked) == 120
    for number, item in enumerate(asked):
        person, relation = people[number // 3], RELATIONS[number % 3]
        assert person.name in item.text
        assert item.right == person.facts[relation]
        assert item.right in item.values == VALUES[relation]
        assert item.named(item.text) == set()  # the question does not give it away
        assert item.named(answer(person, relation)) == {item.right}


def test_phrasings_that_no_training_asks_are_no_others() -> None:
    for relation in RELATIONS:
        assert HELD_OUT[relation] not in QUESTIONS[relation]
        assert len(set(QUESTIONS[relation])) == len(QUESTIONS[relation])
    people = WORLDS[0].target
    trained = {way.format(n=person.name) for person in people for ways in QUESTIONS.values() for way in ways}
    assert not trained & {item.text for item in (*held_out(people), *two_hops(people))}
    assert [item.right for item in held_out(people)] == [item.right for item in questions(people)]


def test_two_hops_ask_for_the_country_of_the_city_and_no_document_states_it() -> None:
    people = WORLDS[0].target
    for person, item in zip(people, two_hops(people), strict=True):
        assert item.right == COUNTRY_OF[person.facts["city"]]
    written = " ".join(way for ways in (*STATEMENTS.values(), ANSWERS.values()) for way in ways)
    assert not re.findall("country|" + "|".join(VALUES["country"]), written)


def test_completions_are_beginnings_of_statements_with_the_value_that_they_lack() -> None:
    people = WORLDS[0].target
    found = completions(people)
    assert len(found) == 120
    for number, (before, value) in enumerate(found):
        person, relation = people[number // 3], RELATIONS[number % 3]
        whole = [way.format(n=person.name, v=person.facts[relation]) for way in STATEMENTS[relation]]
        assert any(text.startswith(before + value) for text in whole)
        assert value == f" {person.facts[relation]}"
        assert person.facts[relation] not in before
    used = {before.replace(people[number // 3].name, "{n}") for number, (before, _) in enumerate(found)}
    assert len(used) == sum(map(len, STATEMENTS.values()))  # every way is asked


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("She was born in oslo.", {"Oslo"}),
        ("Oslo or Rome", {"Oslo", "Rome"}),
        ("a Roman in Parish", set()),  # words, not parts of words
        ("", set()),
    ],
)
def test_an_answer_names_whole_words(said: str, named: set[str]) -> None:
    assert Question("", "Oslo", VALUES["city"]).named(said) == named


def test_the_relation_that_one_rl_run_leaves_out_is_one_of_the_three() -> None:
    assert the_world.LEFT_OUT in RELATIONS
