"""What the site takes from elsewhere when mkdocs builds it: commands, recipes, methods, the API, files of the
repository.

Pages hold a comment such as `<!-- commands -->` where generated text goes. What they hold of it as text is written
again by `python docs/hooks.py`. A page in INCLUDED is the file itself.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from textwrap import fill
from typing import Any

import click

from skillmerge import _HOMES, errors
from skillmerge.cli.main import cli
from skillmerge.cli.show.figures import FIGURES, FORECAST, SPECTRAL, Figure
from skillmerge.recipes.formula.catalog import Keyword, list_methods

ROOT = Path(__file__).resolve().parent.parent
INCLUDED = {
    "benchmarks.md": "benchmarks/RESULTS.md",
    "evidence.md": "experiments/RESULTS.md",
    "evidence-smollm.md": "experiments/SMOLLM.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
IMAGES = [f"experiments/{name}.png" for name in ("accuracy", "orthogonality", "recall", "rounding")]
CODE = r"(?P<code>^```.*?^```$|`[^`\n]+`)"
LINK = re.compile(CODE + r"|(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)", re.M | re.S)
WIDTH = 80


def commands() -> str:
    """The help of every command, as a terminal shows it, by subject."""
    root = click.Context(cli, info_name="skillmerge", terminal_width=WIDTH, color=False, **cli.context_settings)
    parts = [block(cli.get_help(root))]
    for subject, names in cli.groups.items():
        parts.append(f"## {subject}\n")
        for name in names:
            command = cli.commands[name]
            context = click.Context(command, info_name=name, parent=root, terminal_width=WIDTH, color=False)
            parts.append(f"### skillmerge {name}\n\n{block(command.get_help(context))}")
    return "\n".join(parts)


def block(text: str) -> str:
    return "```text\n" + text.replace("\N{NO-BREAK SPACE}", " ").rstrip() + "\n```\n"


def recipes() -> str:
    """Each file of recipes/: its first comment as text, then the file."""
    parts = []
    for path in sorted((ROOT / "recipes").glob("*.yaml"), key=lambda path: path.stem):
        comment, body = [], path.read_text().splitlines()
        while body and body[0].startswith("#"):
            comment.append(body.pop(0).removeprefix("#").strip())
        text, code = re.sub(r"^(When|Not when):", r"**\1:**", "\n".join(comment), flags=re.M), "\n".join(body)
        text = "\n\n".join(fill(part, 118, break_on_hyphens=False) for part in text.split("\n\n"))
        parts.append(f"## {path.stem}\n\n{text}\n\n```yaml\n# {path.name}\n{code}\n```\n")
    return "\n".join(parts)


def methods() -> str:
    """Each merge method, from its docstring."""
    parts = []
    for name, method in list_methods().methods.items():
        said = {f"**{part}:**": text for part, text in method.parts.items() if part != "Example"}
        code = f"merge: {method.parts['Example']}"
        text = [f"## {name}", method.summary, f"```yaml\n{code}\n```", f"`{method.usage}` takes {method.operands}."]
        text += [_linked(paragraph) for paragraph in method.rule]
        if method.keywords:
            rows = [(f"`{it.name}`", it.kind, _default(it)) for it in method.keywords]
            head = [("keyword", "value", "default"), ("---",) * 3]
            text.append("\n".join(f"| {' | '.join(row)} |" for row in [*head, *rows]))
        text += [_linked(f"{part} {words}") for part, words in said.items()]
        parts.append("\n\n".join(text))
    return "\n\n".join(parts)


def _default(keyword: Keyword) -> str:
    return "required" if keyword.required else f"`{keyword.default}`" if keyword.default else "none"


def _linked(text: str) -> str:
    """A paragraph with links to papers, in lines of at most 118 characters."""
    linked = re.sub(r"arXiv (\d{4}\.\d{5})", "[arXiv\N{NO-BREAK SPACE}\\1](https://arxiv.org/abs/\\1)", text)
    lines = fill(linked, 118, break_on_hyphens=False, break_long_words=False)
    return lines.replace("\N{NO-BREAK SPACE}", " ")


def speed() -> str:
    """The first table of the benchmarks, of what readers compare with: seconds, memory, ratio."""
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    table = text[text.index("| command |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    shown = {"skillmerge": "**skillmerge**", "cat": "`cat` of the same files", "mergekit": "mergekit 0.1.5"}
    rows = ["| 1.5B models, bfloat16: 9.3 GB in, 3.1 GB out | seconds | peak MB |", "| --- | --- | --- |"]
    rows += [f"| {shown[row[0]]} | {row[1]} | {row[3]} |" for row in cells if row[0] in shown]
    return "\n".join(rows)


def api() -> str:
    """Every public function, from its docstring."""
    return "\n".join(f"::: skillmerge.{_HOMES[name]}.{name}\n" for name in sorted(_HOMES) if name.islower())


def results() -> str:
    """The classes that public functions return, in the order of their names."""
    found = set()
    for name, module in _HOMES.items():
        tree = ast.parse((ROOT / "skillmerge" / f"{module.replace('.', '/')}.py").read_text())
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
        homes = {node.name: f"skillmerge.{module}" for node in tree.body if isinstance(node, ast.ClassDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                homes |= {alias.name: node.module or "" for alias in node.names}
        returned = {word for node in functions for word in re.findall(r"\w+", ast.unparse(node.returns or node))}
        found |= {(word, homes[word]) for word in returned if homes.get(word, "").startswith("skillmerge")}
    return "\n".join(f"::: {module}.{name}\n    options: {{heading_level: 3}}\n" for name, module in sorted(found))


def raised() -> str:
    """The errors that functions raise, as a table."""
    statuses = dict(re.findall(r"^\| (\d+) \| (.*) \|$", (ROOT / "docs" / "commands.md").read_text(), re.M))
    rows = ["| error | exit status | meaning |", "| --- | --- | --- |"]
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.SkillmergeError):
            status = "" if kind.exit_status == 1 else str(kind.exit_status)  # 1: of its own, or the base of all
            meaning = " ".join((kind.__doc__ or "").split("\n\n")[0].split()) or statuses[status]
            rows.append(f"| `{kind.__name__}` | {status} | {meaning} |")
    return "\n".join(rows)


def figures(table: Mapping[str, Figure]) -> str:
    """What the figures of inspect mean, as a table."""
    rows = [["figure", "key in JSON", "formula", "meaning"], ["---"] * 4]
    for key, figure in table.items():
        source = f" Source: {figure.source}." if figure.source else ""
        formula = figure.formula.replace("|", "\\|")  # GitHub needs that in a table; with_bars takes it away
        rows.append([figure.label, f"`{key}`", f"`{formula}`", figure.meaning + source])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


GENERATED = {
    "commands": commands,
    "recipes": recipes,
    "methods": methods,
    "api": api,
    "results": results,
    "raised": raised,
    "speed": speed,
    "updates": lambda: figures(FIGURES),
    "directions": lambda: figures(SPECTRAL),
    "forecast": lambda: figures(FORECAST),
}


COMMITTED = ("commands", "recipes", "methods", "raised", "speed", "updates", "directions", "forecast")
"""What pages hold as text, so that they make sense without the site: from the comment to `<!-- end of … -->`."""


def with_generated(markdown: str) -> str:
    for name, make in GENERATED.items():
        mark = f"<!-- {name} -->"
        if mark in markdown and name not in COMMITTED:
            markdown = markdown.replace(mark, make())
    return markdown


def written_again(markdown: str) -> str:
    """A page with its committed parts made again."""
    for name in COMMITTED:
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if begin in markdown:
            head, rest = markdown.split(begin)
            markdown = f"{head}{begin}\n{GENERATED[name]().strip()}\n\n{end}{rest.partition(end)[2]}"
    return markdown


def site_link(target: str, folder: str) -> str | None:
    """Where a link of a file in a folder of the repository leads on the site; None for what the site has not."""
    path, _, anchor = target.partition("#")
    found = os.path.normpath(PurePosixPath(folder, path))
    anchor = f"#{anchor}" if anchor else ""
    for page, source in INCLUDED.items():
        if found == source:
            return page + anchor
    if found.startswith("docs/"):
        return found.removeprefix("docs/") + anchor
    if found.startswith("recipes/") and found.endswith(".yaml"):
        return f"recipes.md#{PurePosixPath(found).stem}"
    return f"images/{found}" if found in IMAGES else None


def with_links(markdown: str, folder: str) -> str:
    """Links that lead out of the site become plain text."""

    def change(match: re.Match[str]) -> str:
        target = match["target"]
        if match["code"] or re.match(r"[a-z]+:", target) or target.startswith("#"):
            return match[0]
        found = site_link(target, folder)
        return match["text"] if found is None else f"{match['image']}[{match['text']}]({found})"

    return LINK.sub(change, markdown)


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for image in IMAGES:
        files.append(File.generated(config, f"images/{image}", abs_src_path=str(ROOT / image)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    source = INCLUDED.get(page.file.src_uri)
    if source:
        text = (ROOT / source).read_text().replace("][", "]\\[")  # two brackets in a row are no reference in these
        return with_links(text, str(PurePosixPath(source).parent))
    return with_links(with_bars(with_generated(markdown)), "docs")


def with_bars(markdown: str) -> str:
    """Bars in a table's code without their backslashes: GitHub needs those, and Markdown's Python shows them."""
    return re.sub(r"^\|.*`.*$", lambda row: re.sub(r"`[^`]*`", _without_backslashes, row[0]), markdown, flags=re.M)


def _without_backslashes(code: re.Match[str]) -> str:
    return code[0].replace("\\|", "|")


if __name__ == "__main__":
    for page in sorted((ROOT / "docs").glob("*.md")):
        page.write_text(written_again(page.read_text()))
