"""What this supervisor is made of: the components that the first log entry names.

A component's digest covers every file of its import package as installed, whatever
its name, except bytecode caches (Python rewrites those). Interpreter and libraries
below are the base image's business and are measured with it (docs/deploy).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import sys
from pathlib import Path

from supervisor.errors import ConfigError
from supervisor.formats.log_events import Component

OWN_DISTRIBUTION = "attested-containers"


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
    name: str, plugin_class: type, distribution: importlib.metadata.Distribution
) -> Component:
    """A plugin: its folder for one of ours, its whole top-level package for another's."""
    return Component(
        name=name,
        version=distribution.version,
        digest_sha384=package_digest_sha384(_package_root(plugin_class.__module__, name)),
        role="plugin",
        distribution=distribution.metadata["Name"],
    )


def package_digest_sha384(root: Path) -> str:
    """SHA-384, hex, over `PATH NUL KIND NUL SHA-384-HEX LF` of every file, sorted by path bytes.

    PATH is relative to `root` with `/`; KIND is `f` (content hashed) or `l` (link text
    hashed). `root` may be a single module file. Raises `ConfigError` for an unreadable
    file or one that is neither a file nor a link.
    """
    total = hashlib.sha384()
    entries = [(b"", root)] if root.is_file() else sorted(_files(root))
    for relative, path in entries:
        try:
            if path.is_symlink():
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
        names[:] = [name for name in names if name != "__pycache__"]
        links = [name for name in names if Path(folder, name).is_symlink()]
        for name in files + links:
            if not name.endswith(".pyc"):
                path = Path(folder, name)
                found.append((os.fsencode(path.relative_to(root).as_posix()), path))
    return found


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha384").hexdigest()


def _package_root(module_name: str, plugin_name: str) -> Path:
    parts = module_name.split(".")
    # `plugins` is a shared folder of ours: each plugin is one component of its own.
    package = ".".join(parts[:2]) if parts[0] == "plugins" else parts[0]
    module = sys.modules[package]
    if module.__file__ is None:
        raise ConfigError(plugin_name, "a plugin's package must have files", actual=package)
    file = Path(module.__file__).resolve()
    return file.parent if file.name == "__init__.py" else file
