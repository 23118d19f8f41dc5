"""What this supervisor is made of: the components that the first log entry names.

A component's digest covers every file of its import package as installed, whatever
its name, except bytecode caches (Python rewrites those; a `.pyc` anywhere else is a
program without source, and counts). Interpreter and libraries
below are the base image's business and are measured with it (docs/deploy).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import sys
from pathlib import Path

from supervisor.errors import ConfigError, PluginContractError
from supervisor.formats.log_events import Component

OWN_DISTRIBUTION = "attested-containers"
CACHE_FOLDER = "__pycache__"
# PEP 3147 and 488: the tag keeps it from being imported without its source.
_CACHE_NAME = re.compile(r"[^.]+\.[^.]+(\.opt-[A-Za-z0-9]+)?\.pyc")


def own_component() -> Component:
    """The supervisor itself, `supervisor.formats` included."""
    return Component(
        name="supervisor",
        version=importlib.metadata.version(OWN_DISTRIBUTION),
        digest_sha384=package_digest_sha384(Path(__file__).resolve().parent),
        role="supervisor",
        distribution=OWN_DISTRIBUTION,
    )


def plugin_component(
    name: str,
    entry_module: str,
    plugin_class: type,
    distribution: importlib.metadata.Distribution,
) -> Component:
    """A plugin: its folder for one of ours, its whole top-level package for another's.

    Measured is the package that the entry point names, since that is what was run; where
    a class says that it comes from is the class's own word. Raises `PluginContractError`
    for a class of another package, which would run unmeasured.
    """
    package, own = _package_name(entry_module), _package_name(plugin_class.__module__)
    if own != package:
        raise PluginContractError(
            name, "its class must be of the package that is measured", expected=package, actual=own
        )
    return Component(
        name=name,
        version=distribution.version,
        digest_sha384=package_digest_sha384(_package_root(package, name)),
        role="plugin",
        distribution=distribution.metadata["Name"],
    )


def package_digest_sha384(root: Path) -> str:
    """SHA-384, hex, over `PATH NUL KIND NUL SHA-384-HEX LF` of every file, sorted by path bytes.

    PATH is relative to `root` with `/`; KIND is `f` (content hashed) or `l` (link text
    hashed). `root` may be a single module file. Raises `ConfigError` for an unreadable
    file, one that is neither a file nor a link, and a link out of `root`: what lies
    behind it could be changed, and would run, without another digest.
    """
    total = hashlib.sha384()
    inside = root.resolve()
    entries = [(b"", root)] if root.is_file() else sorted(_files(root))
    for relative, path in entries:
        try:
            if path.is_symlink():
                if not path.resolve().is_relative_to(inside):
                    raise ConfigError(
                        str(path),
                        "a link must lead to what is measured with it",
                        expected=f"a path in {inside}",
                        actual=path.resolve(),
                    )
                kind, digest = b"l", hashlib.sha384(os.fsencode(path.readlink())).hexdigest()
            elif path.is_file():
                kind, digest = b"f", _file_digest(path)
            else:
                raise ConfigError(str(path), "an installed file must be a regular file or a link")
        except OSError as error:
            raise ConfigError(str(path), "must be readable to be measured", actual=error) from error
        total.update(b"%s\0%s\0%s\n" % (relative, kind, digest.encode()))
    return total.hexdigest()


def _files(root: Path) -> list[tuple[bytes, Path]]:
    found = []
    for folder, names, files in os.walk(root):
        links = [name for name in names if Path(folder, name).is_symlink()]
        is_cache = Path(folder).name == CACHE_FOLDER
        for name in files + links:
            if not (is_cache and _CACHE_NAME.fullmatch(name)):
                path = Path(folder, name)
                found.append((os.fsencode(path.relative_to(root).as_posix()), path))
    return found


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha384").hexdigest()


def _package_name(module_name: str) -> str:
    parts = module_name.split(".")
    # `plugins` is a shared folder of ours: each plugin is one component of its own.
    return ".".join(parts[:2]) if parts[0] == "plugins" else parts[0]


def _package_root(package: str, plugin_name: str) -> Path:
    module = sys.modules[package]
    if module.__file__ is None:
        raise ConfigError(plugin_name, "a plugin's package must have files", actual=package)
    file = Path(module.__file__).resolve()
    return file.parent if file.name == "__init__.py" else file
