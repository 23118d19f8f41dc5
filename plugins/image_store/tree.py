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
from collections.abc import Iterable, Iterator

from plugins.image_store.tar_reader import TarEntry, printable
from supervisor import FormatError

MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 4095
MAX_XATTR_NAMES_BYTES = 64 * 1024  # listxattr(2) fails beyond
MAX_XATTR_VALUE_BYTES = 64 * 1024 - 1
CAPABILITY = b"security.capability"
CAPABILITY_V2_BYTES = 20  # linux/capability.h: XATTR_CAPS_SZ_2
WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
AUFS = b".wh..wh."
PAGE_BYTES = 4096
# What tmpfs takes for an inode and its name, at most.
INODE_BYTES = 1024


@dataclasses.dataclass(slots=True, eq=False)
class Node:
    """A file. Several names may lead to one node (hard links); directories have one.

    `mode` has the type bits. A regular file's bytes are `size_bytes` at `data_offset` of
    the tar. `implied`: a directory that no entry describes, only names below it.
    `opaque`: nothing of lower layers shows through.
    """

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size_bytes: int = 0
    data_offset: int = 0
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = dataclasses.field(default_factory=dict)
    children: dict[bytes, Node] = dataclasses.field(default_factory=dict)
    names: int = 1
    implied: bool = False
    opaque: bool = False

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_whiteout(self) -> bool:
        return stat.S_ISCHR(self.mode) and self.device == (0, 0)


def implied_directory() -> Node:
    return Node(stat.S_IFDIR | 0o755, implied=True)


@dataclasses.dataclass(slots=True)
class Tree:
    """`memory_bytes` bounds from above what the tree takes when it is unpacked into tmpfs."""

    root: Node
    memory_bytes: int = 0

    def directories(self) -> Iterator[Node]:
        """Every directory, parents first."""
        waiting = [self.root]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(child for child in node.children.values() if child.is_directory)


def build_tree(entries: Iterable[TarEntry], *, label: str, max_entries: int) -> Tree:
    """Raises `FormatError` naming the entry and the rule it breaks."""
    builder = _Builder(label, max_entries)
    for entry in entries:
        builder.add(entry)
    builder.apply_whiteouts()
    tree = Tree(builder.root)
    tree.memory_bytes = _memory_bytes(tree)
    return tree


class _Builder:
    def __init__(self, label: str, max_entries: int) -> None:
        self.root = implied_directory()
        self._label = label
        self._max_entries = max_entries
        self._count = 0
        self._whiteouts: dict[tuple[bytes, ...], bytes] = {}

    def add(self, entry: TarEntry) -> None:
        self._counted(entry.name)
        parts = self._parts(entry.name, entry.name)
        if any(part.startswith(WHITEOUT) for part in parts[:-1]):
            raise self._refuse(entry.name, "a whiteout is no directory")
        if parts and parts[-1].startswith(WHITEOUT):
            self._note_whiteout(parts, entry.name)
            return
        self._check_xattrs(entry)
        is_directory = stat.S_ISDIR(entry.mode)
        if not parts:
            if not is_directory or entry.hard_link is not None:
                raise self._refuse(entry.name, "the root must be a directory")
            self._describe(self.root, entry)
            return
        parent = self._parent(parts, entry.name)
        name = parts[-1]
        present = parent.children.get(name)
        if entry.hard_link is not None:
            linked = self._linked(entry)
            if linked is not present:
                self._put(parent, name, linked)
                linked.names += 1
        elif is_directory and present is not None and present.is_directory:
            self._describe(present, entry)
        else:
            self._put(parent, name, self._new_node(entry))

    # --- names --------------------------------------------------------------------------------

    def _parts(self, text: bytes, name: bytes) -> tuple[bytes, ...]:
        parts = tuple(part for part in text.split(b"/") if part not in (b"", b"."))
        if b".." in parts:
            raise self._refuse(name, "a name may not climb with '..'")
        if any(len(part) > MAX_NAME_BYTES and not _is_whiteout_name(part) for part in parts):
            raise self._refuse(name, f"a part of a name has at most {MAX_NAME_BYTES} bytes")
        if sum(map(len, parts)) + len(parts) - 1 > MAX_PATH_BYTES:
            raise self._refuse(name, f"a name has at most {MAX_PATH_BYTES} bytes")
        return parts

    def _parent(self, parts: tuple[bytes, ...], name: bytes) -> Node:
        node = self.root
        for depth, part in enumerate(parts[:-1], start=1):
            child = node.children.get(part)
            if child is None:
                self._counted(name)
                child = node.children[part] = implied_directory()
            if not child.is_directory:
                below = printable(b"/".join(parts[:depth]))
                raise self._refuse(name, f"lies below {below}, which is not a directory")
            node = child
        return node

    def _linked(self, entry: TarEntry) -> Node:
        text = entry.hard_link or b""
        node: Node | None = self.root
        for part in self._parts(text, entry.name):
            node = node.children.get(part) if node is not None else None
        if node is None or node.is_directory:
            raise self._refuse(
                entry.name,
                "a hard link must lead to an earlier entry of the layer that is no directory",
                printable(text),
            )
        return node

    def _counted(self, name: bytes) -> None:
        # Implied directories count too: one name can imply two thousand.
        self._count += 1
        if self._count > self._max_entries:
            raise self._refuse(
                name, f"a layer has at most {self._max_entries} entries (max_entries)"
            )

    # --- nodes --------------------------------------------------------------------------------

    @staticmethod
    def _put(parent: Node, name: bytes, node: Node) -> None:
        replaced = parent.children.get(name)
        if replaced is not None:
            replaced.names -= 1
        parent.children[name] = node

    def _new_node(self, entry: TarEntry) -> Node:
        node = Node(0)
        self._describe(node, entry)
        if stat.S_ISLNK(entry.mode):
            if not entry.target or len(entry.target) > MAX_PATH_BYTES:
                raise self._refuse(
                    entry.name, f"a symbolic link's target has 1 to {MAX_PATH_BYTES} bytes"
                )
            node.target = entry.target
        elif stat.S_ISCHR(entry.mode) or stat.S_ISBLK(entry.mode):
            if stat.S_ISCHR(entry.mode) and entry.device == (0, 0):
                raise self._refuse(entry.name, "a character device 0/0 is a forged whiteout")
            node.device = entry.device
        elif stat.S_ISREG(entry.mode):
            node.size_bytes = entry.size_bytes
            node.data_offset = entry.data_offset
        return node

    @staticmethod
    def _describe(node: Node, entry: TarEntry) -> None:
        node.mode = entry.mode
        node.uid = entry.uid
        node.gid = entry.gid
        node.mtime_ns = entry.mtime_ns
        node.xattrs = entry.xattrs
        node.implied = False

    def _check_xattrs(self, entry: TarEntry) -> None:
        for name, value in entry.xattrs.items():
            shown = f"attribute {printable(name)}"
            if b"\0" in name or len(name) > MAX_NAME_BYTES:
                raise self._refuse(
                    entry.name, f"an attribute's name has at most {MAX_NAME_BYTES} bytes", shown
                )
            if b".overlay." in name:
                raise self._refuse(entry.name, "overlayfs attributes are forged whiteouts", shown)
            if not name.startswith(b"user.") and name != CAPABILITY:
                raise self._refuse(
                    entry.name, "only attributes user.* and security.capability are kept", shown
                )
            if len(name) == len(b"user.") or len(value) > MAX_XATTR_VALUE_BYTES:
                raise self._refuse(entry.name, "an attribute has a name and at most 64 KiB", shown)
            self._check_xattr_place(entry, name, value, shown)
        if sum(len(name) + 1 for name in entry.xattrs) > MAX_XATTR_NAMES_BYTES:
            raise self._refuse(entry.name, "the names of all attributes have at most 64 KiB")

    def _check_xattr_place(self, entry: TarEntry, name: bytes, value: bytes, shown: str) -> None:
        is_file = stat.S_ISREG(entry.mode) and entry.hard_link is None
        if name == CAPABILITY:
            # VFS_CAP_REVISION_2, little-endian; revision 3 would name a foreign user namespace.
            if not is_file or len(value) != CAPABILITY_V2_BYTES or value[3] != 2:
                raise self._refuse(entry.name, "a capability is of revision 2, on a file", shown)
        elif entry.hard_link is None and not is_file and not stat.S_ISDIR(entry.mode):
            raise self._refuse(entry.name, "only files and directories have attributes", shown)

    # --- whiteouts ------------------------------------------------------------------------------

    def _note_whiteout(self, parts: tuple[bytes, ...], name: bytes) -> None:
        last = parts[-1]
        if last != OPAQUE and last.startswith(AUFS):
            return  # aufs' own book-keeping
        hidden = last[len(WHITEOUT) :]
        if last != OPAQUE and hidden in (b"", b".", b".."):
            raise self._refuse(name, "a whiteout must name what it hides")
        self._whiteouts[parts] = name

    def apply_whiteouts(self) -> None:
        """After all entries, since order says nothing: `N` beside `.wh.N` is a new `N`."""
        # Upper ones first, so that what lies below a hidden name is dropped with it.
        for parts, name in sorted(self._whiteouts.items(), key=lambda item: (len(item[0]), item)):
            directory = self._existing_or_implied(parts[:-1], name)
            if directory is None:
                continue
            if parts[-1] == OPAQUE:
                directory.opaque = True
                continue
            hidden = parts[-1][len(WHITEOUT) :]
            present = directory.children.get(hidden)
            if present is None:
                directory.children[hidden] = Node(stat.S_IFCHR)
            elif present.is_directory:
                present.opaque = True

    def _existing_or_implied(self, parts: tuple[bytes, ...], name: bytes) -> Node | None:
        """None below something that is no directory: there is nothing to hide."""
        node = self.root
        for part in parts:
            child = node.children.get(part)
            if child is None:
                self._counted(name)
                child = node.children[part] = implied_directory()
            if not child.is_directory:
                return None
            node = child
        return node

    def _refuse(self, name: bytes, rule: str, actual: object | None = None) -> FormatError:
        return FormatError(f"{self._label}, entry {printable(name)}", rule, actual=actual)


def _is_whiteout_name(part: bytes) -> bool:
    """`.wh.N` may be four bytes longer than what it hides."""
    return part.startswith(WHITEOUT) and len(part) <= MAX_NAME_BYTES + len(WHITEOUT)


def _memory_bytes(tree: Tree) -> int:
    total_bytes = INODE_BYTES
    counted: set[int] = set()
    for directory in tree.directories():
        for name, node in directory.children.items():
            total_bytes += INODE_BYTES + len(name)
            if node.names > 1:
                if id(node) in counted:
                    continue
                counted.add(id(node))
            data_bytes = max(node.size_bytes, len(node.target))
            total_bytes += -(-data_bytes // PAGE_BYTES) * PAGE_BYTES
            total_bytes += sum(len(key) + len(value) + 128 for key, value in node.xattrs.items())
    return total_bytes
