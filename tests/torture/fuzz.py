"""Coverage-guided fuzzing: `fuzz.py` runs every target for its share of ten million inputs, two at a time;
`fuzz.py TARGET RUNS [SEED]` runs one. Needs atheris (`pip install 'skillmerge[torture]'`).

Each input may take a second of CPU time, and none may make the process grow by more than 256 MB. A finding ends
the run and leaves the input in the working folder, as libFuzzer does. Knows how to make inputs and to measure;
`targets.py` knows what is read and what is right.
"""

from __future__ import annotations

import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import atheris

if TYPE_CHECKING:
    from targets import Target

RUNS = {
    "header": 5_500_000,
    "index": 1_700_000,
    "expression": 1_000_000,
    "manifest": 1_000_000,
    "recipe": 400_000,
    "plan": 400_000,
}
"""Ten million in all, by the speed of each."""

PORTION = 250_000
"""How many a process makes before another begins anew: inputs grow and slow down, and other seeds find other things."""

SECONDS, MEMORY, LONGEST = 1.0, 256 << 20, 4096


class Watched:
    """A target, with a clock and a scale beside it."""

    def __init__(self, name: str, target: Target, runs: int, close: Callable[[], None]) -> None:
        self.name, self.target, self.runs, self.close = name, target, runs, close
        self.count = self.accepted = 0
        self.slowest = 0.0
        for seed in target.seeds:
            assert target.accepts(seed), f"a seed of {name} is refused"
        self.before = self.peak()
        self.started = time.monotonic()

    @staticmethod
    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def __call__(self, content: bytes) -> None:
        try:
            self.one(content)
        except BaseException as error:
            self.tell("interrupted" if isinstance(error, KeyboardInterrupt) else "A FINDING")
            self.close()
            raise
        if self.count == self.runs:
            self.tell("no finding")
            self.close()

    def one(self, content: bytes) -> None:
        before = time.thread_time()
        self.accepted += self.target.accepts(content)
        seconds = time.thread_time() - before
        self.count += 1
        self.slowest = max(self.slowest, seconds)
        assert seconds <= SECONDS, f"took {seconds:.1f} s"
        assert self.peak() - self.before <= MEMORY, f"took {(self.peak() - self.before) >> 20} MB"

    def tell(self, outcome: str) -> None:
        seconds = time.monotonic() - self.started
        print(
            f"{self.name}: {self.count:,} inputs, {self.accepted:,} accepted, {outcome}; {seconds:.0f} s, "
            f"{self.count / seconds:,.0f} a second, slowest {1000 * self.slowest:.0f} ms, "
            f"at most {(self.peak() - self.before) >> 20} MB",
            flush=True,
        )


def fuzz(name: str, runs: int, seed: int) -> None:
    """Run one target in this process; libFuzzer ends it."""
    with atheris.instrument_imports(include=["skillmerge"]):
        import targets

    finished = targets.Finished()
    target = targets.targets(finished)[name]
    words = finished.folder / "words"
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))
    corpus = finished.folder / "corpus"
    corpus.mkdir()
    for number, content in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(content)

    def mutate(content: bytes, longest: int, number: int) -> bytes:
        """Half of the time a token's worth, which most often leaves JSON or YAML that is some."""
        dice = random.Random(number)
        if dice.random() < 0.5:
            return bytes(atheris.Mutate(content, longest))
        return targets.edited(content, target.words, dice)[:longest]

    options = [f"-runs={runs}", f"-seed={seed}", f"-max_len={LONGEST}", f"-dict={words}", "-rss_limit_mb=0"]
    watched = Watched(name, target, runs, finished.close)
    arguments = [sys.argv[0], *options, "-timeout=30", "-verbosity=0", str(corpus)]
    atheris.Setup(arguments, watched, custom_mutator=mutate)
    atheris.Fuzz()


def _escaped(word: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word.encode(errors="surrogatepass"))


def fuzz_all() -> int:
    """Every target in processes of their own, two at a time; the count of those that found something."""
    jobs = [
        (name, min(PORTION, runs - done), 1 + done // PORTION)
        for name, runs in RUNS.items()
        for done in range(0, runs, PORTION)
    ]

    def one(job: tuple[str, int, int]) -> int:
        return subprocess.run([sys.executable, __file__, *map(str, job)], check=False).returncode

    with ThreadPoolExecutor(2) as pool:
        return sum(status != 0 for status in pool.map(one, jobs))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit(fuzz_all())
    fuzz(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1)
