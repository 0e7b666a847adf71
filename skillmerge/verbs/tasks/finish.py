"""The verb finish: an output of the shards that tasks have made; checks, gates and publication are those of `apply`."""

from __future__ import annotations

import os

from skillmerge.engine.runner import Work, check_words
from skillmerge.errors import UsageError, machine_errors
from skillmerge.outputs.attempts import staging_folder
from skillmerge.outputs.tasks.headers import kept
from skillmerge.plans.opening import Access
from skillmerge.plans.saved import SavedPlan, damage
from skillmerge.recipes.source import RecipeSource
from skillmerge.reporter import Reporter, default_reporter
from skillmerge.verbs.apply import merge
from skillmerge.verbs.records import Checks, Publish
from skillmerge.verbs.result import Result
from skillmerge.verbs.source import source_name
from skillmerge.verbs.target import output_bucket, output_folder
from skillmerge.verbs.tasks.buckets import BucketCollector
from skillmerge.verbs.tasks.collect import Collector, Tasks, Waiting
from skillmerge.verbs.tasks.shard import read_saved
from skillmerge.version import __version__


@machine_errors()
def finish(
    plan: RecipeSource,
    output: str | os.PathLike[str] | None = None,
    *,
    wait: bool = False,
    wait_limit: float | None = None,
    verify: bool = False,
    overwrite: bool = False,
    keep_failed: bool = False,
    strict: bool = False,
    hash_inputs: bool = False,
    allow_code: bool = False,
    follow_links: bool = False,
    hub: str = "stream",
    push: str | None = None,
    no_local: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    pull_request: bool | None = None,
    message: str | None = None,
    reporter: Reporter | None = None,
) -> Result:
    """Check and publish an output whose shards were made by `shard`, as `apply` does.

    plan: path of the saved plan. output: the output folder; replaces `output.path`. wait: until all shards are there,
    or for `wait_limit` seconds; otherwise TemporaryError names those that are missing. verify: reread every shard;
    otherwise a record is believed if size and time of its file are those that it has. no_local: the tasks have uploaded
    their shards. The other arguments are those of `apply`; how rounding was measured and whether NaN was allowed is
    what the tasks were given. Raises a subclass of SkillmergeError; see `skillmerge.errors`.
    """
    reporter = reporter or default_reporter()
    reporter.event("started", skillmerge=__version__, recipe=source_name(plan))
    check_words(hub=hub, wait_limit=wait_limit)
    if keep_failed and no_local:
        raise UsageError("`no_local` keeps no files, so `keep_failed` cannot apply", fix="leave one of them out")
    saved = read_saved(plan)
    bucket, waiting, digest = output_bucket(saved.recipe, output), Waiting(wait, wait_limit), saved.document["digest"]
    tasks: Tasks = Collector(reporter, waiting, digest, reread=verify, overwrite=overwrite)
    if bucket is not None:
        tasks = BucketCollector(bucket, reporter, waiting, digest, reread=verify)
    return merge(
        saved,
        output,
        Access(follow_links, download=hub == "download", headers=_kept_headers(saved, output), allow_code=allow_code),
        Work(),
        Checks(hash_inputs=hash_inputs, full=verify, keep_failed=keep_failed, strict=strict),
        Publish(overwrite, push, no_local, private, revision, pull_request, message),
        reporter,
        tasks,
    )


def _kept_headers(saved: SavedPlan, output: str | os.PathLike[str] | None) -> dict[str, dict[str, bytes]]:
    """Return the headers of models on the Hub that tasks have kept in the output's staging folder, if it has one."""
    if output_bucket(saved.recipe, output) is not None:
        return {}
    folder = staging_folder(output_folder(saved.recipe, output, {}))
    found: dict[str, dict[str, bytes]] = {}
    with damage(saved.path):
        for item in saved.document["inputs"]:
            for row in item["files"] if item["revision"] else ():
                if (header := kept(folder, row["header_sha256"])) is not None:
                    found.setdefault(item["name"], {})[row["name"]] = header
    return found
