"""The bill of materials of a finished output: the model, its files, its input models.

A CycloneDX 1.6 document (https://cyclonedx.org/docs/1.6/json), which security and license tools read; models on the
Hub have a package URL of type huggingface (https://github.com/package-url/purl-spec). Knows the manifest alone. It
is the same for the same output: its serial number follows from the manifest, its time is that of the merge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_OID, uuid5

from skillmerge.checkpoints.place import on_hub
from skillmerge.errors import UsageError
from skillmerge.outputs.hub.card import license_of
from skillmerge.outputs.manifest import Input, Manifest
from skillmerge.outputs.staging import MANIFEST_FILE
from skillmerge.recipes.parse import parse_recipe

if TYPE_CHECKING:
    from cyclonedx.model.component import Component


def check_library() -> None:
    """Raise ImportError if cyclonedx-python-lib is missing."""
    import cyclonedx  # noqa: F401


def build(name: str, proof: Manifest, files: Mapping[str, str], finished: datetime) -> str:
    """Return the document, as JSON, of an output with this manifest. name: of the model; files: its sha256 by name."""
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.tool import ToolRepository
    from cyclonedx.output.json import JsonV1Dot6

    model = _model(name, proof, files)
    entries = parse_recipe(proof.recipe.text, "the manifest's recipe", Path("/")).entries
    inputs = [
        # Of what is put onto a model, the recorded files are that model's, which is an input too.
        _input(item, f"input/{item.name}", with_files=entries[item.name].onto is None)
        for item in proof.inputs
        if not item.stack
    ]
    tool = proof.tool
    tools = [Component(name=tool.name, version=tool.version, type=ComponentType.APPLICATION, bom_ref="tool")]
    document = Bom(
        serial_number=uuid5(NAMESPACE_OID, f"skillmerge {name} {proof.digest}"),
        metadata=BomMetaData(timestamp=finished, tools=ToolRepository(components=tools), component=model),
        components=inputs,
    )
    document.register_dependency(model, inputs)
    return JsonV1Dot6(document).output_as_string(indent=1) + "\n"


def _model(name: str, proof: Manifest, files: Mapping[str, str]) -> Component:
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component, ComponentType, Pedigree

    told = {
        "expression": proof.expression,
        "recipe-sha256": proof.recipe.sha256,
        "plan-digest": proof.plan_digest,
        "manifest-digest": proof.digest,
        "hash-is-of": f"{MANIFEST_FILE}, which has the sha256 of every file",
        **{f"coefficient:{key}": str(value) for key, value in proof.overrides.items()},
    }
    ancestors = [_input(item, f"ancestor/{item.name}", with_files=False) for item in proof.inputs if not item.stack]
    return Component(
        name=name,
        version=proof.plan_digest,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="model",
        hashes=_sha256(files[MANIFEST_FILE]),
        licenses=_licenses(_license(proof)),
        components=[_file(file, "model", sha256) for file, sha256 in files.items()],
        pedigree=Pedigree(ancestors=ancestors, notes=proof.expression),
        properties=[Property(name=f"skillmerge:{key}", value=value) for key, value in told.items()],
    )


def _input(item: Input, ref: str, with_files: bool) -> Component:
    """Return an input model: as a part with its files, or as an ancestor, which only names it."""
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    purl, name = None, item.name
    place = on_hub(item.uri) if item.revision else None
    if place is not None:
        organisation, name = place.repository.split("/")
        purl = PackageURL("huggingface", organisation, name, item.revision, subpath=place.subfolder or None)
    files = item.files if with_files else []
    return Component(
        name=name,
        group=purl.namespace if purl else None,
        version=item.revision,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=ref,
        description=f"`{item.name}` of the recipe",
        licenses=_licenses(item.license),
        purl=purl,
        components=[_file(file.name, ref, file.sha256 or file.stated_sha256) for file in files],
    )


def _file(name: str, owner: str, sha256: str | None) -> Component:
    from cyclonedx.model.component import Component, ComponentType

    return Component(name=name, type=ComponentType.FILE, bom_ref=f"{owner}/{name}", hashes=_sha256(sha256))


def _sha256(digest: str | None) -> list[Any]:
    from cyclonedx.model import HashAlgorithm, HashType

    return [HashType(alg=HashAlgorithm.SHA_256, content=digest)] if digest else []


def _license(proof: Manifest) -> str | None:
    """Return the license of the merge: the recipe's, or its parents' if they agree; or None."""
    declared = parse_recipe(proof.recipe.text, "the manifest's recipe", Path("/")).output.license
    try:
        return license_of(proof.inputs, declared)
    except UsageError:
        return None


def _licenses(name: str | None) -> Iterable[Any]:
    """Return a license as an SPDX identifier, or by its name; the Hub writes them in lower case."""
    from cyclonedx.model.license import DisjunctiveLicense
    from cyclonedx.spdx import fixup_id

    if name is None:
        return []
    known = fixup_id(name)
    return [DisjunctiveLicense(id=known) if known else DisjunctiveLicense(name=name)]
