"""What a layer's tar says, as a tree in memory. Nothing here touches a file system.

All that can be wrong with names, links and whiteouts is refused here, before anything
is made of the tree: it can be written out (`unpack`) or indexed without another look.
The tree is the one that GNU tar and `umoci unpack` would make; whiteouts (OCI image
spec 1.1, layer.md) become what overlayfs knows: a character device 0/0, and a
directory marked opaque.
"""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Callable, Iterable
from typing import NoReturn

from plugins.image_store.tar.node import (
    NO_DEVICE,
    NO_XATTRS,
    Node,
    implied_directory,
    whiteout,
)
from plugins.image_store.tar.reader import TarEntry, printable
from plugins.image_store.tar.xattrs import XattrRefused, kept_xattrs
from supervisor import FormatError

MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 4095
WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
AUFS = b".wh..wh."
PAGE_BYTES = 4096
# What tmpfs takes for an inode and its name, at most.
INODE_BYTES = 1024
# And for an attribute, beside its name and value.
XATTR_BYTES = 128
# What stays in this process's memory of a tree: a tar of tiny attributes takes ten times its
# size there, and it is on no account. 250,000 long names need half of it.
MAX_TEXT_BYTES = 128 * 2**20
# Directories that no entry describes, or that hide what is below them: each must be remembered
# for as long as the layer is, and be made again on top of every root.
MAX_REMEMBERED_DIRECTORIES = 32_768
# A callback at each whiteout would cost as much as applying it.
WHITEOUTS_BETWEEN = 64
# As the last part of a name these say nothing, or climb.
_NO_NAMES = frozenset({b"", b".", b".."})
_NO_PARTS = frozenset({b"", b"."})


@dataclasses.dataclass(slots=True)
class Tree:
    """`memory_bytes` bounds from above what the tree takes when it is unpacked into tmpfs.

    Files that a later entry of the same name replaced count there, too.
    """

    root: Node
    memory_bytes: int = 0


def build_tree(
    entries: Iterable[TarEntry], *, label: str, max_entries: int, between: Callable[[], None]
) -> Tree:
    """Raises `FormatError` naming the entry and the rule it breaks.

    After the last entry `between` is called every `WHITEOUTS_BETWEEN` whiteouts; it may raise.
    """
    builder = _Builder(label, max_entries)
    for entry in entries:
        builder.add(entry)
    builder.apply_whiteouts(between)
    return Tree(builder.root, builder.memory_bytes)


class _Builder:
    def __init__(self, label: str, max_entries: int) -> None:
        self.root = implied_directory()
        self.memory_bytes = INODE_BYTES
        self._label = label
        self._max_entries = max_entries
        self._count = 0
        self._text_bytes = 0
        self._remembered = 0
        # Where the entry before this one lay: its directory's name as it was written, the
        # directory, and how long names there already are. Archives go through one directory
        # after the other, so it mostly fits the next entry too, and it takes no memory. Only
        # what lies in it is ever replaced, so that it stays a part of the tree.
        self._text = b""
        self._directory = self.root
        self._path_bytes = 0
        # By path, the names as they were written.
        self._whiteouts: dict[bytes, bytes] = {}

    def add(self, entry: TarEntry) -> None:
        self._counted(entry.name)
        directory, _, name = entry.name.rpartition(b"/")
        if name in _NO_NAMES:  # "d/" and "d/." are "d"
            directory, _, name = b"/".join(self._parts(entry.name, entry.name)).rpartition(b"/")
            if not name:
                self._describe_root(entry)
                return
        if name.startswith(WHITEOUT):
            self._note_whiteout(directory, name, entry.name)
            return
        if directory != self._text:
            self._enter(directory, entry.name)
        self._check_length(name, self._path_bytes + len(name), entry.name)
        node = entry.node
        if node.xattrs is not NO_XATTRS:
            self._keep_xattrs(entry)
        children = self._directory.children
        present = children.get(name)
        self.memory_bytes += INODE_BYTES + len(name)
        self._keep_text(len(name) + len(node.target), entry.name)
        if entry.hard_link is not None:
            node = self._linked(entry.hard_link, entry.name)
            if node is present:
                return
            node.names += 1
        elif stat.S_ISREG(node.mode):
            self.memory_bytes += -(-node.size_bytes // PAGE_BYTES) * PAGE_BYTES
        elif stat.S_ISDIR(node.mode):
            if present is not None and present.is_directory:
                self._remembered -= present.implied
                _describe(present, node)
                return
        else:
            self._check_special(node, entry.name)
        if present is not None:
            present.names -= 1
        children[name] = node

    # --- names --------------------------------------------------------------------------------

    def _counted(self, name: bytes) -> None:
        # Implied directories count too: one name can imply two thousand.
        self._count += 1
        if self._count > self._max_entries:
            self._refuse(name, f"a layer has at most {self._max_entries} entries (max_entries)")

    def _keep_text(self, size_bytes: int, name: bytes) -> None:
        self._text_bytes += size_bytes
        if self._text_bytes > MAX_TEXT_BYTES:
            self._refuse(
                name,
                "names, link targets, attributes and whiteouts of a layer are bounded together",
                expected=f"at most {MAX_TEXT_BYTES} bytes",
                actual=f"{self._text_bytes} bytes or more",
            )

    def _remember(self, name: bytes) -> None:
        self._remembered += 1
        if self._remembered > MAX_REMEMBERED_DIRECTORIES:
            self._refuse(
                name,
                "too many directories are opaque, or only implied by names below them",
                expected=f"at most {MAX_REMEMBERED_DIRECTORIES}",
                actual=f"{self._remembered} or more",
            )

    def _check_length(self, part: bytes, path_bytes: int, name: bytes) -> None:
        if len(part) > MAX_NAME_BYTES:
            self._refuse(name, f"a part of a name has at most {MAX_NAME_BYTES} bytes")
        if path_bytes > MAX_PATH_BYTES:
            self._refuse(name, f"a name has at most {MAX_PATH_BYTES} bytes")

    def _parts(self, text: bytes, name: bytes) -> list[bytes]:
        parts = [part for part in text.split(b"/") if part not in _NO_PARTS]
        if b".." in parts:
            self._refuse(name, "a name may not climb with '..'")
        return parts

    def _directory_parts(self, text: bytes, name: bytes) -> list[bytes]:
        parts = self._parts(text, name)
        if any(part.startswith(WHITEOUT) for part in parts):
            self._refuse(name, "a whiteout is no directory")
        for part in parts:
            self._check_length(part, 0, name)
        self._check_length(b"", sum(map(len, parts)) + len(parts), name)
        return parts

    def _enter(self, text: bytes, name: bytes) -> None:
        """Remember the directory `text`, and make it if it is not there yet."""
        parts = self._directory_parts(text, name)
        node = self.root
        for depth, part in enumerate(parts, start=1):
            child = node.children.get(part)
            if child is None:
                child = self._imply(node, part, name)
            elif not child.is_directory:
                below = printable(b"/".join(parts[:depth]))
                self._refuse(name, f"lies below {below}, which is not a directory")
            node = child
        self._text = text
        self._directory = node
        self._path_bytes = sum(map(len, parts)) + len(parts)

    def _imply(self, parent: Node, part: bytes, name: bytes) -> Node:
        self._counted(name)
        self._remember(name)
        self._keep_text(len(part), name)
        self.memory_bytes += INODE_BYTES + len(part)
        child = parent.children[part] = implied_directory()
        return child

    def _linked(self, text: bytes, name: bytes) -> Node:
        node: Node | None = self.root
        for part in self._parts(text, name):
            node = node.children.get(part) if node is not None else None
        if node is None or node.is_directory:
            self._refuse(
                name,
                "a hard link must lead to an earlier entry of the layer that is no directory",
                printable(text),
            )
        return node

    # --- nodes --------------------------------------------------------------------------------

    def _describe_root(self, entry: TarEntry) -> None:
        if not entry.node.is_directory or entry.hard_link is not None:
            self._refuse(entry.name, "the root must be a directory")
        self._keep_xattrs(entry)
        _describe(self.root, entry.node)

    def _check_special(self, node: Node, name: bytes) -> None:
        if stat.S_ISLNK(node.mode):
            if not 0 < len(node.target) <= MAX_PATH_BYTES:
                self._refuse(name, f"a symbolic link's target has 1 to {MAX_PATH_BYTES} bytes")
            self.memory_bytes += PAGE_BYTES
        elif stat.S_ISCHR(node.mode) and node.device == NO_DEVICE:
            self._refuse(name, "a character device 0/0 is a forged whiteout")

    def _keep_xattrs(self, entry: TarEntry) -> None:
        node = entry.node
        try:
            node.xattrs = kept_xattrs(
                node.xattrs, mode=node.mode, is_hard_link=entry.hard_link is not None
            )
        except XattrRefused as refused:
            shown = f"attribute {printable(refused.name)}" if refused.name is not None else None
            self._refuse(entry.name, refused.rule, shown)
        xattrs_bytes = sum(
            len(name) + len(value) + XATTR_BYTES for name, value in node.xattrs.items()
        )
        self.memory_bytes += xattrs_bytes
        self._keep_text(xattrs_bytes, entry.name)

    # --- whiteouts ------------------------------------------------------------------------------

    def _note_whiteout(self, directory: bytes, whiteout_name: bytes, name: bytes) -> None:
        parts = self._directory_parts(directory, name)
        hidden = whiteout_name[len(WHITEOUT) :]
        if whiteout_name.startswith(AUFS):
            if whiteout_name != OPAQUE:
                return  # aufs' own book-keeping
        elif hidden in _NO_NAMES:
            self._refuse(name, "a whiteout must name what it hides")
        # `.wh.N` may be four bytes longer than what it hides.
        self._check_length(hidden, sum(map(len, parts)) + len(parts) + len(hidden), name)
        path = b"/".join([*parts, whiteout_name])
        self._keep_text(len(path) + len(name), name)
        self._whiteouts[path] = name

    def apply_whiteouts(self, between: Callable[[], None]) -> None:
        """After all entries, since order says nothing: `N` beside `.wh.N` is a new `N`."""
        # Upper ones first, so that what lies below a hidden name is dropped with it.
        paths = sorted(self._whiteouts, key=lambda path: (path.count(b"/"), path))
        for number, path in enumerate(paths):
            if number % WHITEOUTS_BETWEEN == 0:
                between()
            *parts, whiteout_name = path.split(b"/")
            name = self._whiteouts[path]
            directory = self._existing_or_implied(parts, name)
            if directory is None:
                continue
            if whiteout_name == OPAQUE:
                self._make_opaque(directory, name)
                continue
            hidden = whiteout_name[len(WHITEOUT) :]
            present = directory.children.get(hidden)
            if present is None:
                directory.children[hidden] = whiteout()
                self.memory_bytes += INODE_BYTES + len(hidden)
            elif present.is_directory:
                self._make_opaque(present, name)

    def _make_opaque(self, directory: Node, name: bytes) -> None:
        self._remember(name)
        directory.opaque = True

    def _existing_or_implied(self, parts: list[bytes], name: bytes) -> Node | None:
        """None below something that is no directory: there is nothing to hide."""
        node = self.root
        for part in parts:
            child = node.children.get(part)
            if child is None:
                child = self._imply(node, part, name)
            if not child.is_directory:
                return None
            node = child
        return node

    def _refuse(
        self,
        name: bytes,
        rule: str,
        actual: object | None = None,
        *,
        expected: object | None = None,
    ) -> NoReturn:
        raise FormatError(
            f"{self._label}, entry {printable(name)}", rule, expected=expected, actual=actual
        )


def _describe(node: Node, described: Node) -> None:
    """A directory that is there already takes the metadata of its newest entry."""
    node.mode = described.mode
    node.uid = described.uid
    node.gid = described.gid
    node.mtime_ns = described.mtime_ns
    node.xattrs = described.xattrs
    node.implied = False
