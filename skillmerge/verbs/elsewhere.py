"""An output that does not stay in a folder: it goes to the Hub too, to the Hub alone, or into a bucket."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from skillmerge.checkpoints.place import Bucket
from skillmerge.errors import UsageError
from skillmerge.plans.plan import Plan
from skillmerge.plans.saved import SavedPlan
from skillmerge.recipes.recipe import Recipe
from skillmerge.verbs.records import Checks, Publish

if TYPE_CHECKING:
    from skillmerge.outputs.sending import Sender


def into_a_bucket(source: Recipe | SavedPlan, publish: Publish, checks: Checks) -> Publish:
    """Return how an output in a bucket is published. Raises UsageError for what that cannot be with."""
    recipe = source if isinstance(source, Recipe) else source.recipe
    if publish.overwrite:
        raise UsageError(
            "`--overwrite` cannot replace an output in a bucket", fix="choose another prefix, such as one for each plan"
        )
    if publish.repository is not None or recipe.output.push is not None:
        raise UsageError(
            "an output in a bucket is not pushed in the same run",
            fix="leave the push out, then run `skillmerge push s3://BUCKET/PREFIX ORG/NAME`",
        )
    if checks.keep_failed:
        raise UsageError("an output in a bucket keeps no files here, so `keep_failed` cannot apply", fix="leave it out")
    return replace(publish, no_local=True)


def sender(plan: Plan, publish: Publish, bucket: Bucket | None) -> Sender | None:
    """Return what sends the output elsewhere, if anything does, checked before any work."""
    if bucket is not None:
        from skillmerge.outputs.buckets.sending import BucketOutput

        return BucketOutput(plan, bucket)
    if publish.repository is None and plan.recipe.output.push is None:
        if publish.no_local:
            raise UsageError("`--no-local` without a push would leave no output", fix="pass `--push org/name`")
        return None
    from skillmerge.outputs.hub.push import MergePush

    options = {name: getattr(publish, name) for name in ("private", "revision", "pull_request", "message")}
    return MergePush(plan, publish.repository, publish.no_local, options)
