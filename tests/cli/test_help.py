"""Help screens: every command is in one group, has a summary of one line and examples that its own parser takes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
from click.shell_completion import BashComplete

from skillmerge.cli.completion import install
from skillmerge.cli.help import Command, Option, summary
from skillmerge.cli.main import cli
from skillmerge.errors import UsageError
from tests.conftest import run_cli

COMMANDS = sorted(cli.commands)
ROOT = click.Context(cli, info_name="skillmerge", **cli.context_settings)
"""click keeps a command's help option as the first context has it: that must be the program's own."""
STATUSES = "  Exit statuses:"


def screen(*words: str) -> str:
    process = run_cli(*words, "--help")
    assert (process.returncode, process.stderr) == (0, "")
    return str(process.stdout)


def test_help_shows_every_command_once_with_its_whole_summary() -> None:
    text = screen()
    for name, command in cli.commands.items():
        assert re.findall(rf"^  {name} +(.+)$", text, re.MULTILINE) == [summary(command)]
    assert text.index("Examples:") < text.index("--install-completion") < text.index(STATUSES)


@pytest.mark.parametrize("name", COMMANDS)
def test_summary_is_one_phrase_of_at_most_58_characters(name: str) -> None:
    found = summary(cli.commands[name])
    assert 10 < len(found) <= 58
    assert found[0].isupper()
    assert not found.endswith(".")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_80_columns_and_gives_every_option_a_group_and_a_phrase(name: str) -> None:
    text = screen(name)
    assert max(map(len, text.splitlines())) <= 80
    assert "Options:" not in text
    for parameter in cli.commands[name].params:
        if isinstance(parameter, click.Option):
            assert isinstance(parameter, Option), parameter.name
            assert f"\n{parameter.group}:\n" in text
            assert parameter.help
            assert not parameter.help.endswith(".")
            assert parameter.opts[0] in text


@pytest.mark.parametrize("name", COMMANDS)
def test_help_breaks_no_word_at_60_columns(name: str) -> None:
    """`[default: your account's, usua` / `lly public]`."""
    narrow, wide = (
        click.Context(cli.commands[name], ROOT, name, terminal_width=width).get_help() for width in (58, 200)
    )
    assert not {*re.sub(r"(?<=\w)-\n +", "-", narrow).split()} - {*wide.split()}  # after a hyphen it may


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_taken_by_the_parser(name: str) -> None:
    command = cli.commands[name]
    assert isinstance(command, Command)
    assert command.examples
    for example in command.examples:
        line = example.partition(" > ")[0].replace("*", "x")
        word, *arguments = shlex.split(line)
        assert word == name
        command.make_context(name, arguments, parent=ROOT)
        assert f"\n  $ skillmerge {example}\n" in screen(name)


def test_quiet_is_an_option_of_every_command() -> None:
    for name, command in cli.commands.items():
        assert any("-q" in parameter.opts for parameter in command.params), name


# ------------------------------------------------------------------------------------------------ completion


def test_completion_is_installed_once_and_works_in_bash(tmp_path: Path) -> None:
    done = install(cli, "bash", tmp_path)
    script = tmp_path / ".local/share/skillmerge/completion.bash"
    assert done == [f"wrote {script}", f"added a line to {tmp_path / '.bashrc'}", "start a new shell to use it"]
    before = (tmp_path / ".bashrc").read_text()
    assert install(cli, "bash", tmp_path) == [done[0], done[2]]
    assert (tmp_path / ".bashrc").read_text() == before
    program = tmp_path / "skillmerge"
    program.write_text(
        "#!/bin/sh\n[ $_SKILLMERGE_COMPLETE = bash_complete ] && printf 'plain,apply\\nplain,attest\\n'\n"
    )
    program.chmod(0o755)
    lines = (
        before,
        "COMP_WORDS=(skillmerge a); COMP_CWORD=1",
        f"_skillmerge_completion {program}",
        "echo ${COMPREPLY[*]}",
    )
    process = subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert process.stdout == "apply attest\n"


def test_completion_keeps_what_a_startup_file_holds(tmp_path: Path) -> None:
    (tmp_path / ".zshrc").write_text("alias l=ls")
    install(cli, "zsh", tmp_path)
    first, second = (tmp_path / ".zshrc").read_text().splitlines()
    assert first == "alias l=ls"
    assert second.endswith("# skillmerge completion")
    assert "compinit" in (tmp_path / ".local/share/skillmerge/completion.zsh").read_text()
    assert install(cli, "fish", tmp_path)[0] == f"wrote {tmp_path / '.config/fish/completions/skillmerge.fish'}"


def test_completion_goes_where_variables_send_a_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The startup file there may be in any encoding."""
    for variable, folder in (("HOME", "home"), ("ZDOTDIR", "zsh"), ("XDG_CONFIG_HOME", "config")):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / folder))
    (tmp_path / "zsh/.zshrc").write_bytes(b"# caf\xe9\n")
    assert install(cli, "zsh")[1] == f"added a line to {tmp_path / 'zsh/.zshrc'}"
    assert (tmp_path / "zsh/.zshrc").read_bytes().startswith(b"# caf\xe9\n[ -f ")
    assert install(cli, "fish")[0] == f"wrote {tmp_path / 'config/fish/completions/skillmerge.fish'}"


@pytest.mark.parametrize(
    ("words", "found"), [("ap", "apply"), ("apply --over", "--overwrite"), ("apply --device cu", "cuda")]
)
def test_words_are_completed(words: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_WORDS", f"skillmerge {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    assert found in BashComplete(cli, {}, "skillmerge", "_SKILLMERGE_COMPLETE").complete()


def test_other_shell_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    with pytest.raises(UsageError, match="the shell `tcsh` is not supported"):
        install(cli, home=tmp_path)
    assert not os.listdir(tmp_path)
