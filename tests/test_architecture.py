"""Who may import whom, and what the public surface is: held by walking the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = ("supervisor", "plugins", "verifier", "acon")


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """(module, imported name or "") of every import of ours in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in OURS:
                    yield alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module and node.module.split(".")[0] in OURS:
                for alias in node.names:
                    yield node.module, alias.name


def violations(folder: str) -> list[str]:
    found = []
    for path in modules(folder):
        own = ".".join(path.relative_to(ROOT).parts[:2]).removesuffix(".py")
        for module, name in imports(path):
            if not _allowed(folder, own, module, name):
                found.append(f"{path.relative_to(ROOT)}: {module} {name}")
    return found


def _allowed(folder: str, own: str, module: str, name: str) -> bool:
    top = module.split(".")[0]
    formats = module.startswith("supervisor.formats") or (module, name) == ("supervisor", "formats")
    if folder == "supervisor":
        return top == "supervisor"
    if folder == "verifier":
        return top == "verifier" or formats
    if folder == "plugins":
        return module == "supervisor" or formats or module == own or module.startswith(f"{own}.")
    return True


@pytest.mark.parametrize("folder", OURS)
def test_every_import_goes_the_allowed_way(folder: str) -> None:
    assert modules(folder), "the folder has modules"
    assert violations(folder) == []


def test_the_rule_itself_can_fail() -> None:
    assert not _allowed("supervisor", "supervisor.admission", "plugins.image_store", "x")
    assert not _allowed("plugins", "plugins.image_store", "supervisor.layers", "VerifiedLayer")
    assert not _allowed("plugins", "plugins.image_store", "plugins.oci_runtime", "x")
    assert not _allowed("verifier", "verifier.policy", "supervisor", "Refusal")
    assert not _allowed("verifier", "verifier.policy", "acon.client", "Client")


def test_nothing_imports_the_command() -> None:
    for folder in ("supervisor", "plugins", "verifier"):
        for path in modules(folder):
            assert not any(module.split(".")[0] == "acon" for module, _ in imports(path)), path


def test_formats_do_no_input_output_and_read_no_clock() -> None:
    forbidden = {"trio", "os", "time", "socket", "subprocess", "pathlib", "pluggy", "structlog"}
    for path in modules("supervisor/formats"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]}
            else:
                continue
            assert not names & forbidden, f"{path}: {names & forbidden}"


def test_formats_and_verifier_load_without_trio_or_pluggy() -> None:
    script = (
        "import sys, verifier, supervisor.formats.evidence, supervisor.formats.signature\n"
        "import pkgutil, importlib\n"
        "for module in pkgutil.iter_modules(verifier.__path__):\n"
        "    importlib.import_module('verifier.' + module.name)\n"
        "print(sorted({'trio', 'pluggy', 'structlog'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


def test_every_public_name_of_the_supervisor_can_be_imported() -> None:
    import supervisor

    for name in supervisor.__all__:
        assert getattr(supervisor, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        supervisor.no_such_name  # noqa: B018 - the access is the test


def test_no_module_is_longer_than_it_can_be_read() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in OURS
        for path in modules(folder)
        if (lines := len(path.read_text().splitlines())) > 420
    }
    assert long == {}
