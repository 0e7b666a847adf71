"""Shell completion: click's own script, installed where bash, zsh or fish read it.

Knows where each shell looks; click knows the commands.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from skillmerge.errors import UsageError

_VARIABLE = "_SKILLMERGE_COMPLETE"


@dataclass(frozen=True, slots=True)
class _Shell:
    """script: where the script goes, below the home folder. startup: the file that must source it, where one must.

    before: what the script needs before it.
    """

    script: str
    startup: str | None = None
    before: str = ""


_SHELLS = {
    "bash": _Shell(".local/share/skillmerge/completion.bash", ".bashrc"),
    "zsh": _Shell(".local/share/skillmerge/completion.zsh", ".zshrc", "autoload -Uz compinit && compinit\n"),
    "fish": _Shell(".config/fish/completions/skillmerge.fish"),
}


def install(command: click.Command, shell: str | None = None, home: Path | None = None) -> list[str]:
    """Install shell completion for a command, and return what was done, one sentence each.

    shell: bash, zsh or fish; by default that of $SHELL. Installing again changes nothing.
    Raises UsageError for other shells, and for files that cannot be written.
    """
    name = shell or Path(os.environ.get("SHELL", "")).name
    if name not in _SHELLS:
        known = "completion works in bash, zsh and fish"
        raise UsageError(f"the shell `{name or 'unknown'}` is not supported", fix=f"{known}: set SHELL to one of them")
    home, place = home or Path.home(), _SHELLS[name]
    source = get_completion_class(name)
    assert source is not None, "click has all three"
    script = source(command, {}, "skillmerge", _VARIABLE).source()
    path = home / place.script
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(place.before + script, encoding="utf-8")
        done = [f"wrote {path}"]
        if place.startup is not None:
            done += _sourced(home / place.startup, path)
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}", fix="make it writable, then rerun") from error
    return [*done, "start a new shell to use it"]


def _sourced(startup: Path, script: Path) -> list[str]:
    """Make a shell's startup file read the script, unless it does already."""
    line = f'[ -f "{script}" ] && . "{script}"'
    text = startup.read_text(encoding="utf-8") if startup.exists() else ""
    if line in text:
        return []
    with open(startup, "a", encoding="utf-8") as stream:
        stream.write(f"{'' if text.endswith(chr(10)) or not text else chr(10)}{line}  # skillmerge completion\n")
    return [f"added a line to {startup}"]
