"""The documentation names everything that users meet, with the defaults that hold."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import pkgutil
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import msgspec
import pytest

import acon
import plugins
import supervisor
from acon.cli import build_parser
from supervisor import events
from supervisor.config import Config
from supervisor.errors import Refusal
from supervisor.formats.log_events import OPERATIONS
from supervisor.hookspecs import hook_kind
from supervisor.plugin_contract import hook_names
from verifier.policy import Policy

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "examples").rglob("*.md"))
    if "build" not in path.parts
)
_LINK = re.compile(r"(?<!!)\[[^\]\n]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
_FENCE = re.compile(r"^( *)```.*?^\1```$", re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def table_rows(text: str) -> Iterator[list[str]]:
    """The cells of every line that is a row of a table."""
    for line in text.splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


# --- hooks, events, refusals --------------------------------------------------------------------


@pytest.mark.parametrize("hook", hook_names())
def test_every_hook_has_a_row_that_says_its_kind(hook: str) -> None:
    rows = [row for row in table_rows(page("plugins.md")) if row[0].startswith(f"`{hook}(")]
    assert [row[1] for row in rows] == [hook_kind(hook)]
    assert f"`{hook}`" in page("architecture.md")


EVENTS = [
    value
    for value in vars(events).values()
    if isinstance(value, type)
    and issubclass(value, msgspec.Struct)
    and value.__module__ == events.__name__
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: event.__name__)
def test_every_event_has_a_row_that_names_its_fields(event: type[msgspec.Struct]) -> None:
    rows = [row for row in table_rows(page("plugins.md")) if row[0] == f"`{event.__name__}`"]
    assert len(rows) == 1
    documented = set(re.findall(r"`([a-z0-9_]+)`", rows[0][1]))
    assert documented == set(event.__struct_fields__)
    is_observed = event in get_args(events.Event)
    assert ("observers" in rows[0][2]) == is_observed


def refusals() -> list[type[Refusal]]:
    """Every kind of refusal that any module defines."""
    for package in (supervisor, plugins, acon):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    found = [Refusal]
    for parent in found:  # grows while it is walked
        found += parent.__subclasses__()
    return [
        one for one in found if one.__module__.split(".")[0] in ("supervisor", "plugins", "acon")
    ]


def test_every_kind_of_refusal_is_documented_with_its_class() -> None:
    documented = {tuple(row[:2]) for row in table_rows(page("formats.md"))}
    kinds = {one.kind: one for one in reversed(refusals())}  # children share their parent's
    assert len(kinds) > 10
    assert {(f"`{kind}`", f"`{one.__name__}`") for kind, one in kinds.items()} <= documented


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_log_operation_has_a_row_that_names_its_fields(operation: str) -> None:
    (row,) = [row for row in table_rows(page("architecture.md")) if row[0] == f"`{operation}`"]
    for field in OPERATIONS[operation].__struct_fields__:
        assert field == "critical" or field in row[1]


# --- settings ----------------------------------------------------------------------------------


def settings(struct: type[msgspec.Struct], prefix: str) -> Iterator[tuple[str, object]]:
    """(dotted path, default) of every setting, nested Structs walked."""
    for field in msgspec.structs.fields(struct):
        path = f"{prefix}{field.name}"
        types = (field.type, *get_args(field.type))
        nested = [one for one in types if isinstance(one, type) and issubclass(one, msgspec.Struct)]
        default = field.default
        if field.default_factory is not msgspec.NODEFAULT:
            default = field.default_factory()
        if not nested or default is None:
            yield path, default
        if nested:
            yield from settings(nested[0], f"{path}.")


def daemon_settings() -> list[tuple[str, object]]:
    found = [one for one in settings(Config, "") if one[0] != "plugin"]
    points = importlib.metadata.entry_points(group="supervisor.plugins")
    own = [point for point in points if point.module.split(".")[0] == "plugins"]
    assert own
    for point in own:
        found += settings(point.load().Config, f"plugin.{point.name}.")
    return found


@pytest.mark.parametrize(("path", "default"), daemon_settings(), ids=lambda one: str(one)[:60])
def test_every_setting_of_the_daemon_is_documented_with_its_default(
    path: str, default: object
) -> None:
    (row,) = [row for row in table_rows(page("config.md")) if row[0] == f"`{path}`"]
    assert row[2]
    if default is msgspec.NODEFAULT:
        assert row[1] == "required" or path.startswith("plugin.http_api.tcp.")
    elif default is None:
        assert row[1] == "none"
    else:
        shown = tomllib.loads(f"value = {row[1].strip('`')}")["value"]
        assert shown == msgspec.json.decode(msgspec.json.encode(default))


def test_no_setting_is_documented_that_does_not_exist() -> None:
    named = {row[0].strip("`") for row in table_rows(page("config.md")) if row[0].startswith("`")}
    assert named == {path for path, _ in daemon_settings()}


@pytest.mark.parametrize("path", [path for path, _ in settings(Policy, "")])
def test_every_setting_of_the_policy_is_documented(path: str) -> None:
    # Entries of lists and alternatives are documented under the name of what holds them.
    documented = "".join(row[0] for row in table_rows(page("policy.md")))
    parent = path.rpartition(".")[0]
    assert f"`{path}`" in documented or f"`{parent}`" in documented


# --- commands ----------------------------------------------------------------------------------


def commands(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every subcommand that does something, by its full name."""
    groups = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    if not groups:
        yield " ".join(("acon", *path)), parser
    for group in groups:
        for name, child in group.choices.items():
            yield from commands(child, (*path, name))


def section(text: str, title: str) -> str:
    """What stands under a heading of the second level."""
    _, found, rest = f"\n{text}".partition(f"\n## {title}\n")
    assert found, f"no section {title!r}"
    return rest.partition("\n## ")[0]


@pytest.mark.parametrize(
    ("name", "parser"), list(commands(build_parser())), ids=lambda one: str(one)[:40]
)
def test_every_subcommand_has_a_section_with_its_options_and_an_example(
    name: str, parser: argparse.ArgumentParser
) -> None:
    text = page("commands.md")
    own = section(text, name)
    assert len(re.findall(rf"^    .*{re.escape(name)}", own, re.MULTILINE)) >= 2  # usage, example
    takes_a_daemon = "[DAEMON]" in own
    options = [option for action in parser._actions for option in action.option_strings]
    assert takes_a_daemon == ("--url" in options)
    for option in options:
        where = text if option in ("--socket", "--url", "--ca-file") else own
        assert option in ("-h", "--help") or f"`{option}`" in where, option


def test_every_section_about_a_subcommand_is_about_one_that_exists() -> None:
    documented = {title for title in _HEADING.findall(page("commands.md")) if "acon " in title}
    assert documented == {name for name, _ in commands(build_parser())}


# --- links and files -----------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in _HEADING.findall(text)
    }


@pytest.mark.parametrize("source", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_relative_link_resolves(source: Path) -> None:
    text = _FENCE.sub("", source.read_text(encoding="utf-8"))
    broken = []
    for link in _LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (source.parent / name).resolve() if name else source
        is_there = target.is_relative_to(ROOT) and target.exists()
        if not is_there or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached = {ROOT / "README.md"}
    waiting = [ROOT / "README.md"]
    while waiting:
        source = waiting.pop()
        for link in _LINK.findall(source.read_text(encoding="utf-8")):
            target = (source.parent / link.partition("#")[0]).resolve()
            if target.suffix == ".md" and target.is_file() and target not in reached:
                reached.add(target)
                waiting.append(target)
    assert set(PAGES) <= reached


@pytest.mark.parametrize("source", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_json_and_toml_block_of_the_documentation_is_well_formed(source: Path) -> None:
    text = source.read_text(encoding="utf-8")
    for indent, language, body in re.findall(
        r"^( *)```(json|toml)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL
    ):
        plain = "\n".join(line.removeprefix(indent) for line in body.splitlines())
        if language == "toml":
            assert tomllib.loads(plain)
        else:
            # Sizes are shown as N where any number may stand.
            assert json.loads(re.sub(r":N\b", ":0", plain))
