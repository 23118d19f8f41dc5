"""Tar archives that hold images, read where they lie: nothing is ever extracted.

An index of the members is made once, from their headers alone, by the daemon's strict reader
(Python's tarfile takes negative sizes, and reads a header as long as it says it is). A name
leads to an offset in the archive, never to a path in a file system, so a hostile name has
nothing to reach for; archives with such names are refused all the same, since nobody who
means well makes them.
"""

from __future__ import annotations

import mmap
import os
import posixpath
import stat
from collections.abc import Mapping
from pathlib import Path

import msgspec

from acon.errors import UsageError
from plugins.image_store.tar.reader import TarEntry, TarReader, printable
from supervisor.formats.errors import FormatError

_MAX_MEMBERS = 65_536
_MAX_LINK_HOPS = 8
_MAGIC_BYTES = 8
_COMPRESSIONS = {
    b"\x1f\x8b": "gunzip",
    b"\x28\xb5\x2f\xfd": "zstd -d",
    b"\xfd7zXZ\x00": "unxz",
    b"BZh": "bunzip2",
}


class Member(msgspec.Struct, frozen=True):
    """A file of the archive, or a link to one (`target`, a name in the archive)."""

    offset_bytes: int
    size_bytes: int
    target: str | None = None


class ArchiveFiles:
    """The files of an archive; an `acon.images.layout.LayoutFiles`. Opens it for each read."""

    def __init__(self, path: Path, members: Mapping[str, Member]) -> None:
        self._path = path
        self._members = members

    @property
    def name(self) -> str:
        return str(self._path)

    def __contains__(self, path: str) -> bool:
        return path in self._members

    def read(self, path: str, *, max_bytes: int) -> bytes:
        member = self._find(path)
        if member.size_bytes > max_bytes:
            raise UsageError(
                f"{self.name}: {path}",
                "the file is too large",
                expected=f"at most {max_bytes} bytes",
                actual=f"{member.size_bytes} bytes",
            )
        return self.head(path, member.size_bytes)

    def head(self, path: str, count_bytes: int) -> bytes:
        """The first `count_bytes` of a member, or all of it if it is shorter."""
        member = self._find(path)
        with self._path.open("rb") as file:
            file.seek(member.offset_bytes)
            return file.read(min(count_bytes, member.size_bytes))

    def locate(self, path: str) -> tuple[str, int, int]:
        member = self._find(path)
        return str(self._path), member.offset_bytes, member.size_bytes

    def _find(self, path: str) -> Member:
        """Follows links inside the archive."""
        name = path
        for _hop in range(_MAX_LINK_HOPS + 1):
            member = self._members.get(name)
            if member is None:
                via = "" if name == path else f", which {path} links to"
                raise UsageError(self.name, f"there must be a file {name}{via}")
            if member.target is None:
                return member
            name = member.target
        raise FormatError(
            f"{self.name}: {path}",
            "a link must lead to a file",
            expected=f"{_MAX_LINK_HOPS} links at most",
            actual="more, or links in a circle",
        )


def read_archive(path: Path) -> ArchiveFiles:
    """Read the headers of an uncompressed tar. Blocking; memory grows with their number only.

    They are read as strictly as the daemon reads those of layers. Raises `UsageError` for what
    is no such file and `FormatError` naming the member that is wrong: a name outside the
    archive or there twice, bytes beyond the end, a sparse file.
    """
    resolved = path.resolve()
    if not resolved.is_file():
        raise UsageError(str(path), "must be a tar file")
    members: dict[str, Member] = {}
    with resolved.open("rb") as file:
        start = file.read(_MAGIC_BYTES)
        _refuse_compressed(start, path)
        if not start:
            raise UsageError(str(path), "must be a tar file", actual="an empty one")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as archive:
            entries = TarReader(
                archive, label=str(path), max_entries=_MAX_MEMBERS, between=lambda: None
            )
            for entry in entries:
                _add(members, entry, archive=str(path))
    return ArchiveFiles(resolved, members)


def _add(members: dict[str, Member], entry: TarEntry, *, archive: str) -> None:
    item = f"{archive}: {printable(entry.name)}"
    name, node = _inside(os.fsdecode(entry.name), item=item), entry.node
    if node.is_directory:
        return
    if len(members) >= _MAX_MEMBERS:
        raise FormatError(item, "an archive of images has a bounded number of files")
    if name in members:
        raise FormatError(item, "an archive of images holds each name once")
    if entry.hard_link is not None:
        members[name] = Member(0, 0, _inside(os.fsdecode(entry.hard_link), item=item))
    elif stat.S_ISLNK(node.mode):
        # From the folder that the link lies in.
        target = posixpath.join(posixpath.dirname(name), os.fsdecode(node.target))
        members[name] = Member(0, 0, _inside(target, item=item))
    elif stat.S_ISREG(node.mode):
        members[name] = Member(node.data_offset, node.size_bytes)
    else:
        raise FormatError(item, "an archive of images holds plain files and links only")


def _inside(name: str, *, item: str) -> str:
    """The name without `.` and `..`; refuses what would lie outside the archive."""
    plain = posixpath.normpath(name or ".")
    if plain.startswith(("/", "../")) or plain == ".." or "\0" in plain:
        raise FormatError(item, "a name must lie inside the archive", actual=name[:160])
    return "" if plain == "." else plain


def _refuse_compressed(start: bytes, path: Path) -> None:
    for magic, command in _COMPRESSIONS.items():
        if start.startswith(magic):
            raise UsageError(
                str(path), f"an archive of images must be uncompressed: `{command}` it first"
            )
