"""What the tests of publishing have in common: the repository that they publish to, and what has to be there then."""

from __future__ import annotations

from pathlib import Path

from conftest import MODELS
from hub_server import HubServer

MERGED = "acme/merged"


def put_on_the_hub(hub: HubServer, recipe: Path) -> dict[str, str]:
    """The family as repositories; their URIs."""
    for model in MODELS:
        hub.create_from(f"acme/{model}", recipe.parent / model, card={"license": "mit"})
    return {model: f"hf://acme/{model}" for model in MODELS}


def assert_is_published(hub: HubServer, folder: Path, ref: str = "main") -> None:
    """Every file of the output is there, byte for byte, with a card, and no weights beside them."""
    tree = hub.tree(MERGED, ref)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(tree) == files | {"README.md", ".gitattributes"}
    for name in files:
        assert hub.content(MERGED, name, ref) == (folder / name).read_bytes(), name
