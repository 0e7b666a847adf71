"""Published schemas, and what holds a document to them.

Libraries are imported where they are used: all together take two seconds of a core (jsonschema compiles grammars), and
every worker imports every module of tests.
"""

from __future__ import annotations

from typing import Any


def fits(document: Any, kind: str) -> None:
    """Hold a document to a schema that check-jsonschema brings. Raises ValidationError."""
    import jsonschema
    from check_jsonschema.builtin_schemas import get_builtin_schema

    schema = get_builtin_schema(kind)
    jsonschema.validators.validator_for(schema)(schema).validate(document)


def validator(schema: dict[str, Any]) -> Any:
    """The validator of a recipe's schema."""
    import jsonschema

    return jsonschema.Draft7Validator(schema)


def fits_kubernetes(document: dict[str, Any], version: str = "1.33") -> None:
    """Hold a document to what a version of Kubernetes knows, and refuse what it does not."""
    import kubernetes_validate

    kubernetes_validate.validate(document, version, strict=True)


def fits_sarif(log: Any) -> None:
    from pydantic_sarif.model import StaticAnalysisResultsFormatSarifVersion210JsonSchema as SarifModel

    SarifModel.model_validate(log)


def fits_bom(text: str) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
