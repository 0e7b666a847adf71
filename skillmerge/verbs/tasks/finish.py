"""The verb finish: an output of the shards that tasks have made; checks, gates and publication are those of `apply`."""

from __future__ import annotations

import os

from skillmerge.engine.runner import Work, check_words
from skillmerge.errors import machine_errors
from skillmerge.plans.opening import Access
from skillmerge.recipes.source import RecipeSource
from skillmerge.reporter import Reporter, default_reporter
from skillmerge.verbs.apply import merge
from skillmerge.verbs.records import Checks, Publish
from skillmerge.verbs.result import Result
from skillmerge.verbs.source import source_name
from skillmerge.verbs.target import output_bucket
from skillmerge.verbs.tasks.buckets import BucketCollector
from skillmerge.verbs.tasks.collect import Collector, Tasks
from skillmerge.verbs.tasks.shard import read_saved
from skillmerge.version import __version__


@machine_errors()
def finish(
    plan: RecipeSource,
    output: str | os.PathLike[str] | None = None,
    *,
    wait: bool = False,
    verify: bool = False,
    overwrite: bool = False,
    keep_failed: bool = False,
    strict: bool = False,
    hash_inputs: bool = False,
    allow_code: bool = False,
    follow_links: bool = False,
    hub: str = "stream",
    push: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    pull_request: bool | None = None,
    message: str | None = None,
    reporter: Reporter | None = None,
) -> Result:
    """Check and publish an output whose shards were made by `shard`, as `apply` does.

    plan: path of the saved plan. output: the output folder; replaces `output.path`. wait: until all shards are there;
    otherwise TemporaryError names those that are missing. verify: reread every shard; otherwise a record is believed if
    size and time of its file are those that it has. The other arguments are those of `apply`; how rounding was measured
    and whether NaN was allowed is what the tasks were given. Raises a subclass of SkillmergeError; see
    `skillmerge.errors`.
    """
    reporter = reporter or default_reporter()
    reporter.event("started", skillmerge=__version__, recipe=source_name(plan))
    check_words(hub=hub)
    saved = read_saved(plan)
    bucket = output_bucket(saved.recipe, output)
    tasks: Tasks = Collector(reporter, wait=wait, reread=verify)
    if bucket is not None:
        tasks = BucketCollector(bucket, reporter, wait=wait, reread=verify)
    return merge(
        saved,
        output,
        Access(follow_links, download=hub == "download", allow_code=allow_code),
        Work(),
        Checks(hash_inputs=hash_inputs, full=verify, keep_failed=keep_failed, strict=strict),
        Publish(overwrite, push, False, private, revision, pull_request, message),
        reporter,
        tasks,
    )
