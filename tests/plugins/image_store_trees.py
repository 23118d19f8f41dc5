"""Layers as trees: read from a tar, made visible both ways, and as others unpack them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from mmap import PROT_READ, mmap
from pathlib import Path

from plugins.image_store.index import IndexPlan, plan_index
from plugins.image_store.mount.erofs import mount_index
from plugins.image_store.mount.kernel import MS_RDONLY, mount, unmount
from plugins.image_store.mount.memory_files import MemoryFiles
from plugins.image_store.mount.unpack import write_tree
from plugins.image_store.tar.node import Node
from plugins.image_store.tar.reader import TarReader
from plugins.image_store.tar.tree import Tree, build_tree

TOOL_TIMEOUT_S = 120
MAX_ENTRIES = 1000


def nothing() -> None:
    """A `between` that never raises."""


def read_tree(tar: bytes | mmap, *, max_entries: int = MAX_ENTRIES) -> Tree:
    entries = TarReader(tar, label="layer", max_entries=max_entries, between=nothing)
    return build_tree(entries, label="layer", max_entries=max_entries, between=nothing)


def paths(tree: Tree) -> dict[str, Node]:
    """Every file by its path, the root left out."""
    found = {}
    waiting = [("", tree.root)]
    while waiting:
        path, node = waiting.pop()
        for name, child in node.children.items():
            below = f"{path}/{os.fsdecode(name)}".lstrip("/")
            found[below] = child
            waiting.append((below, child))
    return found


@contextmanager
def memory_file(content: bytes) -> Iterator[int]:
    fd = os.memfd_create("test")
    try:
        with os.fdopen(os.dup(fd), "wb") as stream:
            stream.write(content)
        yield fd
    finally:
        os.close(fd)


def index_bytes(plan: IndexPlan) -> bytes:
    """What the plan writes."""
    with memory_file(b"") as fd:
        plan.write(fd, between=nothing)
        return os.pread(fd, plan.size_bytes + 1, 0)


@contextmanager
def mounted_plan(plan: IndexPlan, tar_fd: int, target: Path) -> Iterator[Path]:
    """The index over the tar, mounted at `target` while the body runs."""
    files = MemoryFiles()
    try:
        index = files.make()
        try:
            plan.write(index.fd, between=nothing)
            assert os.fstat(index.fd).st_size == plan.size_bytes
            mount_index(index.fd, tar_fd, target)
        finally:
            index.close()
        try:
            yield target
        finally:
            unmount(os.fsencode(target))
    finally:
        files.close()


@contextmanager
def indexed(tar: bytes, target: Path, *, max_entries: int = MAX_ENTRIES) -> Iterator[Path]:
    """The tar's tree, mounted at the new directory `target` while the body runs."""
    target.mkdir()
    plan = plan_index(read_tree(tar, max_entries=max_entries), len(tar))
    with memory_file(tar) as tar_fd, mounted_plan(plan, tar_fd, target):
        yield target


@contextmanager
def unpacked(tar: bytes, target: Path, *, max_entries: int = MAX_ENTRIES) -> Iterator[Path]:
    """The tar's tree, written into a tmpfs at the new directory `target`."""
    target.mkdir()
    tree = read_tree(tar, max_entries=max_entries)
    mount(b"test", os.fsencode(target), filesystem=b"tmpfs", flags=0)
    try:
        with memory_file(tar) as tar_fd:
            root_fd = os.open(target, os.O_RDONLY)
            try:
                write_tree(tree, root_fd, tar_fd=tar_fd, between=nothing)
            finally:
                os.close(root_fd)
        yield target
    finally:
        unmount(os.fsencode(target))


@contextmanager
def indexed_file(tar_fd: int, target: Path) -> Iterator[Path]:
    """As `indexed`, of a tar too large to be read."""
    with mmap(tar_fd, 0, prot=PROT_READ) as archive:
        tree = read_tree(archive)
        plan = plan_index(tree, len(archive))
    target.mkdir()
    with mounted_plan(plan, tar_fd, target):
        yield target


Way = Callable[[bytes, Path], AbstractContextManager[Path]]
WAYS: dict[str, Way] = {"index": indexed, "unpack": unpacked}


def extract_with_gnu_tar(tar: bytes, target: Path) -> None:
    """Into the new directory `target`, as root: with owners, attributes and all."""
    target.mkdir()
    # Delayed: else it leaves today's time on a directory that it fills later.
    options = ["-p", "--same-owner", "--numeric-owner", "--delay-directory-restore"]
    attributes = ["--xattrs", "--xattrs-include=*"]
    subprocess.run(
        ["tar", "-x", *options, *attributes, "-C", target],
        input=tar,
        check=True,
        timeout=TOOL_TIMEOUT_S,
    )


@contextmanager
def stacked(layers: Sequence[bytes], directory: Path, *, way: Way) -> Iterator[Path]:
    """What overlayfs makes of the layers (lowest first), each made visible by `way`."""
    with ExitStack() as stack:
        lower = directory / "empty"
        lower.mkdir()
        lowers = [lower]
        for number, tar in enumerate(layers):
            lowers.insert(0, stack.enter_context(way(tar, directory / str(number))))
        target = directory / "merged"
        target.mkdir()
        options = b"lowerdir=" + b":".join(os.fsencode(path) for path in lowers)
        mount(
            b"overlay", os.fsencode(target), filesystem=b"overlay", flags=MS_RDONLY, options=options
        )
        try:
            yield target
        finally:
            unmount(os.fsencode(target))
