"""Shell completion: click's own script, installed where bash, zsh or fish read it.

Knows where each shell looks; click knows the commands.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from skillmerge.errors import UsageError

_VARIABLE = "_SKILLMERGE_COMPLETE"
_BEFORE = {"bash": "", "zsh": "autoload -Uz compinit && compinit\n", "fish": ""}
"""What each shell's script needs before it."""


def install(command: click.Command, shell: str | None = None, home: Path | None = None) -> list[str]:
    """Install shell completion for a command, and return what was done, one sentence each.

    shell: bash, zsh or fish [default: that of $SHELL]. home: replaces the home folder and the variables that move a
    shell's files. Installing again changes nothing.
    Raises UsageError for other shells, and for files that cannot be written.
    """
    name = shell or Path(os.environ.get("SHELL", "")).name
    if name not in _BEFORE:
        known = "completion works in bash, zsh and fish"
        raise UsageError(f"the shell `{name or 'unknown'}` is not supported", fix=f"{known}: set SHELL to one of them")
    path, startup = _places(name, home or Path.home(), os.environ if home is None else {})
    source = get_completion_class(name)
    assert source is not None, "click has all three"
    script = source(command, {}, "skillmerge", _VARIABLE).source()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_BEFORE[name] + script, encoding="utf-8")
        done = [f"wrote {path}"]
        if startup is not None and _add_line(startup, path):
            done.append(f"added a line to {startup}")
    except OSError as error:
        where = error.filename or path
        raise UsageError(f"{where} cannot be written: {error.strerror}", fix="make it writable, then rerun") from error
    return [*done, "start a new shell to use it"]


def _places(shell: str, home: Path, variables: Mapping[str, str]) -> tuple[Path, Path | None]:
    """Return where the script goes, and the startup file that has to read it."""
    if shell == "fish":
        return Path(variables.get("XDG_CONFIG_HOME") or home / ".config") / "fish/completions/skillmerge.fish", None
    folder = Path(variables.get("ZDOTDIR") or home) if shell == "zsh" else home
    return home / f".local/share/skillmerge/completion.{shell}", folder / f".{shell}rc"


def _add_line(startup: Path, script: Path) -> bool:
    """Make a shell's startup file read the script. Returns whether that needed a new line."""
    path = shlex.quote(str(script))
    line = os.fsencode(f"[ -f {path} ] && . {path}")
    held = startup.read_bytes() if startup.exists() else b""  # in whatever encoding
    if line in held:
        return False
    with open(startup, "ab") as stream:
        stream.write((b"" if held.endswith(b"\n") or not held else b"\n") + line + b"  # skillmerge completion\n")
    return True
