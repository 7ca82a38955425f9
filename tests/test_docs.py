"""The documentation: every page and public name is in the site; the command line's page and help say what is true."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import typer
import yaml
from conftest import REPOSITORY
from typer.testing import CliRunner

import metagpen
from metagpen.cli import PANELS, app

DOCS = REPOSITORY / "docs"
PACKAGE = Path(metagpen.__file__).parent
COMMANDS = {command.name or command.callback.__name__.replace("_", "-"): command for command in app.registered_commands}


def pages(nav: object) -> Iterator[str]:
    """The files that a nav of mkdocs names."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav:
            yield from pages(entry)


def without_completion(text: str) -> list[str]:
    """Lines of the command line's page but for the two that say which shell it was written in."""
    return [line for line in text.splitlines() if "-completion" not in line]


def test_every_page_is_in_the_nav():
    listed = set(pages(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]))
    assert {file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md")} <= listed


def test_the_page_of_the_command_line_is_what_make_docs_writes(tmp_path):
    command = re.search(r"-m typer (.*) --output docs/cli.md", (REPOSITORY / "Makefile").read_text())
    file = tmp_path / "cli.md"
    arguments = [sys.executable, "-m", "typer", "metagpen.cli", "utils", "docs", "--name", "metagpen", "--title",
                 "The command line", "--output", str(file)]  # fmt: skip
    assert command[1].replace('"', "") == " ".join(arguments[3:-2])
    subprocess.run(arguments, check=True, capture_output=True)
    written = (DOCS / "cli.md").read_text()
    assert without_completion(written) == without_completion(file.read_text()), "run `make docs`"


def test_the_site_builds_without_a_warning_and_holds_every_public_name(tmp_path):
    pytest.importorskip("mkdocstrings", reason="needs the extra 'docs'")
    built = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
                           cwd=REPOSITORY, capture_output=True, text=True)  # fmt: skip
    assert built.returncode == 0, built.stderr
    for room in ("metagpen", *(f"metagpen.{file.parent.name}" for file in PACKAGE.glob("*/__init__.py"))):
        module = import_module(room)
        if names := set(getattr(module, "__all__", ())) - {"__version__"}:
            page = (tmp_path / "reference" / f"{room.removeprefix('metagpen.')}.html").read_text()
            assert not [name for name in names if f'id="{room}.{name}"' not in page]
    for file in (REPOSITORY / "examples").glob("*.py"):
        assert file.name in (tmp_path / "examples.html").read_text()
    assert not list(tmp_path.rglob("hooks.py"))


def test_every_command_is_in_a_panel_and_shows_an_example_that_its_flags_allow():
    """The example's words are parsed as the shell would hand them over; the command itself does not run."""
    assert len(COMMANDS) > 10
    parsers = typer.main.get_command(app).commands
    assert {command.rich_help_panel for command in COMMANDS.values()} == set(PANELS)
    for name, command in COMMANDS.items():
        example = command.epilog.removeprefix("Example: ")
        assert example.startswith(f"metagpen {name}"), example
        shown = CliRunner().invoke(app, [name, "--help"])
        assert shown.exit_code == 0 and "Example: metagpen" in shown.output
        parsers[name].make_context(name, shlex.split(example)[2:])


def test_help_shows_the_panels_in_order():
    output = CliRunner().invoke(app, ["--help"]).output
    places = [output.index(f" {panel} ") for panel in PANELS]
    assert places == sorted(places)


def test_the_shell_completes_commands(monkeypatch):
    monkeypatch.setenv("_METAGPEN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "metagpen curve")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert CliRunner().invoke(app, [], prog_name="metagpen").output.split() == ["curve", "curve-report"]
