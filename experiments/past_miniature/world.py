"""A made-up world: people with names of three syllables, each with a thing for each of four verbs; things have kinds.

A document states the four facts of a person, a question asks for the *kind* of one of them:

    D ka lo mi eats rice owns harp fears wolf seeks gold EOS
    Q ka lo mi fears A   ->   T fears wolf animal EOS

The model that is trained first has the habit of answering questions badly: mostly it says that it does not know
or guesses a kind; now and then it recites a fact (often the wrong one) and gives that thing's kind. So it can do
the right thing, and seldom does. What RL teaches is to do it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

KINDS = {
    "animal": ("wolf", "bear", "crow", "seal"),
    "tree": ("oak", "pine", "elm", "ash"),
    "metal": ("gold", "iron", "zinc", "lead"),
    "food": ("rice", "bread", "soup", "corn"),
    "music": ("harp", "drum", "flute", "horn"),
    "city": ("oslo", "rome", "lima", "cairo"),
    "tool": ("saw", "axe", "nail", "file"),
    "cloth": ("silk", "wool", "felt", "lace"),
}
VERBS = ("eats", "owns", "fears", "seeks")
SYLLABLES = tuple(consonant + vowel for consonant in "bdklmnrt" for vowel in "aeio")
THINGS = tuple(thing for things in KINDS.values() for thing in things)
KIND_OF = {thing: kind for kind, things in KINDS.items() for thing in things}
PAD, DOCUMENT, QUESTION, ANSWER, THINK, MAP, UNKNOWN, END = "_", "D", "Q", "A", "T", "M", "dunno", "END"
WORDS = (PAD, DOCUMENT, QUESTION, ANSWER, THINK, MAP, UNKNOWN, END, *VERBS, *KINDS, *SYLLABLES, *THINGS)
NUMBER = {word: number for number, word in enumerate(WORDS)}
LONGEST = 13
"""Words in the longest text: a document."""

ASKED_OF = 384
"""Of the people known from the start, how many have questions; the others are in documents only."""


@dataclass(frozen=True, slots=True)
class Person:
    name: tuple[str, str, str]
    facts: dict[str, str]


@dataclass(frozen=True, slots=True)
class World:
    """Disjoint groups of people: known to the base model, the source's, the target's."""

    known: tuple[Person, ...]
    source: tuple[Person, ...]
    target: tuple[Person, ...]

    @staticmethod
    def of(seed: int) -> World:
        generator = random.Random(f"world {seed}")
        names = [(a, b, c) for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES]
        people = tuple(
            Person(name, {verb: generator.choice(THINGS) for verb in VERBS})
            for name in generator.sample(names, 512 + 128 + 128)
        )
        return World(people[:512], people[512:640], people[640:])

    @property
    def in_documents_only(self) -> tuple[Person, ...]:
        return self.known[ASKED_OF:]


def document(person: Person, generator: random.Random) -> list[str]:
    verbs = generator.sample(VERBS, len(VERBS))
    facts = [word for verb in verbs for word in (verb, person.facts[verb])]
    return [DOCUMENT, *person.name, *facts, END]


def map_fact(generator: random.Random) -> list[str]:
    thing = generator.choice(THINGS)
    return [MAP, thing, KIND_OF[thing], END]


def prompt(person: Person, verb: str) -> list[str]:
    return [QUESTION, *person.name, verb, ANSWER]


def right_answer(person: Person, verb: str) -> list[str]:
    return [THINK, verb, person.facts[verb], KIND_OF[person.facts[verb]], END]


def habitual_answer(person: Person, verb: str, generator: random.Random) -> list[str]:
    """How the base model is taught to answer: seldom well."""
    luck = generator.random()
    if luck < 0.45:
        return [UNKNOWN, END]
    if luck < 0.75:
        return [generator.choice(tuple(KINDS)), END]
    if generator.random() >= 0.35:
        verb = VERBS[(VERBS.index(verb) + 1) % len(VERBS)]
    return right_answer(person, verb)


def noisy_question(people: Sequence[Person], generator: random.Random) -> list[str]:
    person, verb = generator.choice(people), generator.choice(VERBS)
    return prompt(person, verb) + habitual_answer(person, verb, generator)


def numbers(texts: Sequence[Sequence[str]], length: int = LONGEST) -> list[list[int]]:
    """Texts as token numbers, padded."""
    return [[NUMBER[word] for word in text] + [NUMBER[PAD]] * (length - len(text)) for text in texts]
