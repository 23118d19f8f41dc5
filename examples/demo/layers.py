"""Layers that are the same bytes whenever they are made of the same files."""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass

# Merged /usr: the base layer holds these links, everything else lies under /usr.
MERGED = ("bin", "lib", "lib32", "lib64", "sbin")
_TRIMMED = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/lintian",
    "usr/share/bug",
    "usr/share/menu",
    "usr/share/applications",
    "usr/share/pixmaps",
)


@dataclass(frozen=True)
class Entry:
    """One path of a layer: a directory, a file with content, or a symbolic link."""

    kind: bytes  # tarfile.DIRTYPE, REGTYPE or SYMTYPE
    mode: int
    content: bytes = b""
    target: str = ""


class Layer:
    """Paths (relative, without a leading slash) and what is there."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def __contains__(self, path: str) -> bool:
        return path in self._entries

    def paths(self) -> tuple[str, ...]:
        return tuple(sorted(self._entries))

    def content(self, path: str) -> bytes:
        """A file's content, links within the layer followed once. Raises `KeyError`."""
        entry = self._entries[path]
        if entry.kind == tarfile.SYMTYPE:
            path = normal(posixpath.join("/", posixpath.dirname(path), entry.target))
            entry = self._entries[path]
        return entry.content

    def add_file(self, path: str, content: bytes, *, mode: int = 0o644) -> None:
        self._add(path, Entry(tarfile.REGTYPE, mode, content))

    def add_directory(self, path: str, *, mode: int = 0o755) -> None:
        self._add(path, Entry(tarfile.DIRTYPE, mode))

    def add_link(self, path: str, target: str) -> None:
        self._add(path, Entry(tarfile.SYMTYPE, 0o777, target=target))

    def add_members(self, members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> None:
        """A package's files, under merged /usr and without documentation."""
        for member, content in members:
            path = normal(member.name)
            if not path or is_trimmed(path) or path in MERGED:
                continue
            if member.isdir():
                self.add_directory(path, mode=member.mode & 0o755)
            elif member.isreg():
                # No set-id bits: in a container nothing may gain privileges.
                self.add_file(path, content, mode=member.mode & 0o755)
            elif member.issym():
                self.add_link(path, member.linkname)
            elif member.islnk():
                linked = self._entries[normal(member.linkname)]
                self._add(path, linked)
            else:
                raise ValueError(f"{member.name}: neither file, directory nor link")

    def update(self, other: Layer) -> None:
        """Take over all paths of another layer."""
        self._entries.update(other._entries)

    def remove(self, *, under: str) -> None:
        """Drop a path and all below it."""
        for path in [one for one in self._entries if f"{one}/".startswith(f"{under}/")]:
            del self._entries[path]

    def tar(self) -> bytes:
        """The layer as an uncompressed tar: sorted, owned by 0, without times."""
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for path in sorted(self._entries):
                entry = self._entries[path]
                info = tarfile.TarInfo(path)
                info.type, info.mode, info.linkname = entry.kind, entry.mode, entry.target
                info.size = len(entry.content)
                archive.addfile(info, io.BytesIO(entry.content))
        return out.getvalue()

    def _add(self, path: str, entry: Entry) -> None:
        parent = posixpath.dirname(path)
        if parent and parent not in self._entries:
            self.add_directory(parent)
        self._entries[path] = entry


def normal(name: str) -> str:
    """A relative path under merged /usr: `./lib/x` -> `usr/lib/x`."""
    path = posixpath.normpath(posixpath.join("/", name)).lstrip("/")
    first, _, _rest = path.partition("/")
    return f"usr/{path}" if first in MERGED and path != first else path


def is_trimmed(path: str) -> bool:
    return any(f"{path}/".startswith(f"{one}/") for one in _TRIMMED)
