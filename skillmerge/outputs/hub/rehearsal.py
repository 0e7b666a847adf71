"""What a push would do, found without the Hub: the files, the model card, and what would be refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skillmerge.brief import brief
from skillmerge.errors import SkillmergeError
from skillmerge.outputs.hub.card import CARD_FILE
from skillmerge.outputs.output import Output
from skillmerge.outputs.verify import SIGNATURE_FILE
from skillmerge.recipes.recipe import Push


class Refusals:
    """Collects what would refuse a push, if all of it is wanted: `with refusals: …` a check. Otherwise the first one
    is raised."""

    def __init__(self, all: bool) -> None:
        self.found: list[SkillmergeError] = []
        self._all = all

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, SkillmergeError) and self._all:
            self.found.append(error)
            return True
        return False


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What a push would publish, and as what. Nothing was sent, and the Hub was not asked.

    title: the commit's. card: the text of the model card, or None if it would be refused. signed: whether a signature
    is sent along. refused: why the push would fail, as far as this machine knows. sizes: of files, in bytes.
    """

    output: Output
    push: Push
    title: str
    card: str | None
    signed: bool
    refused: tuple[SkillmergeError, ...]
    sizes: Mapping[str, int]

    __repr__ = brief

    @property
    def ok(self) -> bool:
        return not self.refused

    @property
    def files(self) -> dict[str, int]:
        """Every file that the commit would have, and its size in bytes."""
        names = self.output.manifest.file_names | ({SIGNATURE_FILE} if self.signed else set())
        card = {CARD_FILE: len(self.card.encode())} if self.card is not None else {}
        return {name: self.sizes[name] for name in sorted(names)} | card

    def as_dict(self) -> dict[str, Any]:
        files = self.files
        return {
            "dry_run": True,
            "folder": self.output.shown,
            "repository": self.push.repository,
            "private": self.push.private,
            "revision": self.push.revision,
            "pull_request": self.push.pull_request,
            "title": self.title,
            "files": [{"name": name, "size": size} for name, size in files.items()],
            "bytes": sum(files.values()),
            "card": self.card,
            "refused": [error.as_dict() for error in self.refused],
            **(self.refused[0].as_dict() if self.refused else {}),
        }
