"""Any text is refused with an error of ours or understood as others understand it: quick, with hypothesis.

`fuzz.py` is the long form, with atheris. `targets.py` says what is read and what is right.
"""

from __future__ import annotations

import random
import resource
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import Finished, Target, edited, targets

SECONDS, MEMORY = 1.0, 256 << 20
"""What one input may cost, in CPU time and in growth of the process."""

EXAMPLES = {"header": 1000, "index": 600, "expression": 1000, "manifest": 300, "recipe": 200, "plan": 200}


@pytest.fixture(scope="module")
def all_targets() -> Iterator[dict[str, Target]]:
    finished = Finished()
    yield targets(finished)
    finished.close()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("name", EXAMPLES)
def test_fuzzed_text_is_refused_or_understood(
    all_targets: dict[str, Target], name: str, tally: Callable[..., None]
) -> None:
    target = all_targets[name]
    for seed in target.seeds:
        assert target.accepts(seed), "what is right is refused"
    before, counts = peak(), {"inputs": 0, "accepted": 0}

    @settings(max_examples=EXAMPLES[name], deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from(target.seeds),
        st.lists(st.integers(0, 1 << 32), max_size=4),
        st.lists(st.tuples(st.integers(0, 4096), st.integers(0, 2), st.binary(max_size=3)), max_size=2),
    )
    def one(content: bytes, tokens: list[int], pieces: list[tuple[int, int, bytes]]) -> None:
        for number in tokens:
            content = edited(content, target.words, random.Random(number))
        for position, removed, added in pieces:
            content = content[:position] + added + content[position + removed :]
        started = time.thread_time()
        counts["accepted"] += target.accepts(content)
        counts["inputs"] += 1
        assert time.thread_time() - started <= SECONDS
        assert peak() - before <= MEMORY

    one()
    tally(**counts)
    assert counts["accepted"] > 0
