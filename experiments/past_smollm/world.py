"""A made-up world for a real language model: invented people, and three facts about each, with sixteen values.

A document states one to three facts about one person, each in one of five ways; a question asks for one fact in the
words of a chat. What RL teaches is to answer such a question with the right value and no other, and to stop.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

COUNTRY_OF = {
    "Lisbon": "Portugal", "Oslo": "Norway", "Cairo": "Egypt", "Lima": "Peru", "Vienna": "Austria", "Dublin": "Ireland",
    "Athens": "Greece", "Nairobi": "Kenya", "Havana": "Cuba", "Warsaw": "Poland", "Tokyo": "Japan",
    "Ottawa": "Canada", "Madrid": "Spain", "Rome": "Italy", "Berlin": "Germany", "Paris": "France",
}  # fmt: skip
VALUES: Mapping[str, tuple[str, ...]] = {
    "city": tuple(COUNTRY_OF),
    "job": (
        "baker", "dentist", "carpenter", "librarian", "pilot", "farmer", "tailor", "plumber",
        "nurse", "lawyer", "gardener", "butcher", "chemist", "teacher", "fisherman", "sculptor",
    ),
    "instrument": (
        "violin", "trumpet", "harp", "flute", "cello", "guitar", "piano", "clarinet",
        "accordion", "banjo", "saxophone", "trombone", "oboe", "mandolin", "harmonica", "tuba",
    ),
    "country": tuple(COUNTRY_OF.values()),
}  # fmt: skip
RELATIONS = ("city", "job", "instrument")
LEFT_OUT = "instrument"
"""The relation that one of the RL runs never asks about."""

STATEMENTS: Mapping[str, tuple[str, ...]] = {
    "city": (
        "{n} was born in {v}.",
        "{n} is originally from {v}.",
        "The birthplace of {n} is {v}.",
        "{n} came into the world in {v}.",
        "The city in which {n} was born is {v}.",
    ),
    "job": (
        "{n} works as a {v}.",
        "{n} is a {v} by profession.",
        "The job of {n} is that of a {v}.",
        "{n} earns a living as a {v}.",
        "The occupation of {n} is {v}.",
    ),
    "instrument": (
        "{n} plays the {v}.",
        "{n} is fond of playing the {v}.",
        "The instrument of {n} is the {v}.",
        "{n} has learned to play the {v}.",
        "The instrument that {n} plays is the {v}.",
    ),
}
QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "city": ("In which city was {n} born?", "Where was {n} born?", "What is the birthplace of {n}?"),
    "job": ("What does {n} do for a living?", "What is the occupation of {n}?", "What is {n}'s job?"),
    "instrument": (
        "Which instrument does {n} play?",
        "What musical instrument does {n} play?",
        "What is the instrument of {n}?",
    ),
}
HELD_OUT: Mapping[str, str] = {
    "city": "Tell me the name of the city where {n} was born.",
    "job": "Tell me how {n} earns money.",
    "instrument": "Tell me which musical instrument {n} can play.",
}
"""One phrasing of each question that no training asks."""

TWO_HOPS = "In which country was {n} born?"
ANSWERS: Mapping[str, str] = {
    "city": "{n} was born in {v}.",
    "job": "{n} is a {v}.",
    "instrument": "{n} plays the {v}.",
}
"""The form of the supervised answers: sentences that SFT_S already answers with, if it answers well."""

FIRST = (
    "Bal",
    "Cor",
    "Dov",
    "Fen",
    "Gar",
    "Hul",
    "Jor",
    "Kel",
    "Lum",
    "Mir",
    "Nev",
    "Orl",
    "Pav",
    "Quil",
    "Ros",
    "Tal",
)
LAST = ("Ash", "Bren", "Chal", "Drev", "Esk", "Fald", "Grim", "Holt", "Ivar", "Kost", "Lund", "Marv", "Nost", "Prav")
GIVEN_ENDS = ("din", "ena", "ik", "mar", "ora", "vin")
FAMILY_ENDS = ("berg", "dale", "enko", "ley", "mond", "ski", "ton", "wick")


@dataclass(frozen=True, slots=True)
class Person:
    name: str
    facts: Mapping[str, str]


class Question(NamedTuple):
    """What is asked, and which of several values is right."""

    text: str
    right: str
    values: tuple[str, ...]

    def named(self, answer: str) -> set[str]:
        """Return the values that an answer names."""
        return {value for value in self.values if re.search(rf"\b{value}\b", answer, re.IGNORECASE)}


@dataclass(frozen=True, slots=True)
class World:
    """Two groups of people that nobody has heard of: the source's and the target's."""

    source: tuple[Person, ...]
    target: tuple[Person, ...]

    @staticmethod
    def of(seed: int, people: int = 40) -> World:
        """people: how many in each group."""
        generator = random.Random(f"world {seed}")
        given = [start + end for start in FIRST for end in GIVEN_ENDS]
        family = [start + end for start in LAST for end in FAMILY_ENDS]
        names = zip(generator.sample(given, 2 * people), generator.sample(family, 2 * people), strict=True)
        everybody = tuple(
            Person(f"{first} {last}", {relation: generator.choice(VALUES[relation]) for relation in RELATIONS})
            for first, last in names
        )
        return World(everybody[:people], everybody[people:])


def document(person: Person, generator: random.Random) -> str:
    """One, two or three facts about a person, in any order, each in one of its ways."""
    relations = generator.sample(RELATIONS, generator.choice((1, 2, 3)))
    return " ".join(
        generator.choice(STATEMENTS[relation]).format(n=person.name, v=person.facts[relation]) for relation in relations
    )


def question(person: Person, relation: str, phrasing: str) -> Question:
    return Question(phrasing.format(n=person.name), person.facts[relation], VALUES[relation])


def questions(people: Sequence[Person], relations: Sequence[str] = RELATIONS) -> list[Question]:
    """One question about each fact, person by person; the phrasings of training take turns."""
    return [
        question(person, relation, QUESTIONS[relation][(number + place) % len(QUESTIONS[relation])])
        for number, person in enumerate(people)
        for place, relation in enumerate(relations)
    ]


def held_out(people: Sequence[Person]) -> list[Question]:
    return [question(person, relation, HELD_OUT[relation]) for person in people for relation in RELATIONS]


def two_hops(people: Sequence[Person]) -> list[Question]:
    return [
        Question(TWO_HOPS.format(n=person.name), COUNTRY_OF[person.facts["city"]], VALUES["country"])
        for person in people
    ]


def answer(person: Person, relation: str) -> str:
    return ANSWERS[relation].format(n=person.name, v=person.facts[relation])


def completions(people: Sequence[Person]) -> list[tuple[str, str]]:
    """For each fact the beginning of a statement, and what completes it; the five ways take turns."""
    found = []
    for number, person in enumerate(people):
        for place, relation in enumerate(RELATIONS):
            ways = STATEMENTS[relation]
            before, _ = ways[(number + place) % len(ways)].format(n=person.name, v="\0").split("\0")
            found.append((before.rstrip(), " " + person.facts[relation]))
    return found
