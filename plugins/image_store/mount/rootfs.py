"""One container's root: its layers through its own owners, under overlayfs.

    ID/parts/top     directories that the layers lack or imply (`supplement`)
    ID/parts/0..n    top and the layers, highest first, idmapped or copied
    ID/parts/rw      a tmpfs with what the container writes, if it may
    ID/root          the overlay: nodev; set-user-ID bits count only in the container's
                     own user namespace, since no owner outside it is shown

Mounts are there only while the root is made: overlayfs keeps clones of its own of what it
is made of, and the overlay itself is kept as a `HeldMount`. Everything of a container lies
in its own directory, so that `removal` ends it wherever it was interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from plugins.image_store.mount.held import HeldMount
from plugins.image_store.mount.kernel import (
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    idmapped_clone,
    mount,
    unmount,
)
from plugins.image_store.mount.prepared import PreparedLayer
from plugins.image_store.mount.shifted_copy import OVERFLOW_ID, copy_shifted
from plugins.image_store.mount.supplement import LayerView, supplement
from plugins.image_store.mount.unpack import write_tree
from plugins.image_store.tar.tree import INODE_BYTES
from supervisor import Conflict, RuntimeFailed

ROOT = "root"
PARTS = "parts"
SPACE = "rw"
# mount(2) takes a page of options; each layer needs up to 20 bytes of it.
MAX_LAYERS = 127
# Keeps what a container does with overlayfs' special features out of layers.
OVERLAY_OPTIONS = b"redirect_dir=nofollow,index=off,metacopy=off"


class RootPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What to mount. `layers` lowest first; without `user_namespace_fd` owners are copied.

    `set_aside` is told how many bytes the supplement takes before it is written; may raise.
    """

    item: str
    base: Path
    layers: tuple[PreparedLayer, ...]
    outside: dict[int, int]
    user_namespace_fd: int | None
    writable_bytes: int | None
    max_entries: int
    set_aside: Callable[[int], None]


def assemble(plan: RootPlan, *, between: Callable[[], None]) -> HeldMount:
    """Mount it and take it; blocking. The caller closes it, then removes `plan.base`.

    Raises `OSError` or `Refusal`; `plan.base` is the caller's to remove then, too.
    """
    if not 1 <= len(plan.layers) <= MAX_LAYERS:
        raise Conflict(
            plan.item,
            "a container's root has a bounded number of layers",
            expected=f"1 to {MAX_LAYERS}",
            actual=len(plan.layers),
        )
    plan.base.mkdir(mode=0o700)
    root = plan.base / ROOT
    root.mkdir(mode=0o700)
    parts = plan.base / PARTS
    parts.mkdir(mode=0o700)
    top = parts / "top"
    top.mkdir(mode=0o700)
    _write_top(plan, top, between)
    with ExitStack() as opened:
        lower_fds = []
        for index, source in enumerate((top, *(x.directory for x in _visible(plan)))):
            between()
            part = parts / str(index)
            part.mkdir(mode=0o700)
            _show(plan, source, part, between)
            lower_fds.append(_opened(opened, part))
        options = b"lowerdir=" + b":".join(b"/proc/self/fd/%d" % fd for fd in lower_fds)
        if plan.writable_bytes is not None:
            options += _writable(plan, parts, lower_fds[0], opened)
        read_only = MS_RDONLY if plan.writable_bytes is None else 0
        mount(
            b"overlay",
            os.fsencode(root),
            filesystem=b"overlay",
            flags=MS_NODEV | read_only,
            options=options + b"," + OVERLAY_OPTIONS,
        )
    held = HeldMount.taken_from(os.fsencode(root))
    try:
        _unmount_parts(plan, parts, len(lower_fds))
    except OSError:
        held.close()
        raise
    return held


def _unmount_parts(plan: RootPlan, parts: Path, count: int) -> None:
    """Lazily: a child that another thread just forked has our descriptors until its exec."""
    mounted = [str(index) for index in range(count)] if plan.user_namespace_fd is not None else []
    if plan.writable_bytes is not None:
        mounted.append(SPACE)
    for name in mounted:
        unmount(os.fsencode(parts / name), lazily=True)


def _visible(plan: RootPlan) -> list[PreparedLayer]:
    """Highest first, down to one whose root is opaque: overlayfs asks no root whether it is."""
    visible: list[PreparedLayer] = []
    for layer in reversed(plan.layers):
        visible.append(layer)
        if layer.hints.opaque:
            break
    return visible


def _opened(opened: ExitStack, directory: Path) -> int:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    opened.callback(os.close, fd)
    return fd


def _write_top(plan: RootPlan, top: Path, between: Callable[[], None]) -> None:
    with ExitStack() as opened:
        views = [
            LayerView(_opened(opened, layer.directory), layer.hints) for layer in _visible(plan)
        ]
        tree = supplement(views, item=plan.item, max_entries=plan.max_entries, between=between)
        plan.set_aside(tree.memory_bytes)
        # It has directories only, so there is no tar to take contents from.
        write_tree(tree, _opened(opened, top), tar_fd=-1, between=between)


def _show(plan: RootPlan, source: Path, part: Path, between: Callable[[], None]) -> None:
    if plan.user_namespace_fd is not None:
        idmapped_clone(os.fsencode(source), os.fsencode(part), plan.user_namespace_fd)
        return
    with ExitStack() as opened:
        copy_shifted(_opened(opened, source), _opened(opened, part), plan.outside, between=between)


def _writable(plan: RootPlan, parts: Path, top_fd: int, opened: ExitStack) -> bytes:
    """A tmpfs for what the container writes; its root directory looks like the layers'."""
    space = parts / SPACE
    space.mkdir(mode=0o700)
    size_bytes = plan.writable_bytes or 0
    mount(
        b"acon-writable",
        os.fsencode(space),
        filesystem=b"tmpfs",
        flags=MS_NOSUID | MS_NODEV | MS_NOEXEC,
        options=b"mode=0700,size=%d,nr_inodes=%d" % (size_bytes, size_bytes // INODE_BYTES),
    )
    upper, work = space / "upper", space / "work"
    upper.mkdir(mode=0o700)
    work.mkdir(mode=0o700)
    status = os.fstat(top_fd)
    upper_fd, work_fd = _opened(opened, upper), _opened(opened, work)
    os.fchown(upper_fd, status.st_uid, status.st_gid)
    os.fchmod(upper_fd, status.st_mode & 0o7777)
    # Never overlayfs' own: a supplement hides nothing.
    for name in os.listxattr(top_fd):
        os.setxattr(upper_fd, name, os.getxattr(top_fd, name))
    os.utime(upper_fd, ns=(status.st_mtime_ns, status.st_mtime_ns))
    return b",upperdir=/proc/self/fd/%d,workdir=/proc/self/fd/%d" % (upper_fd, work_fd)


def outside_ids(pairs: Sequence[tuple[int, int]], *, item: str) -> dict[int, int]:
    """Owners in a layer to owners as shown. Raises `RuntimeFailed` for a map without root."""
    outside = dict(pairs)
    if 0 not in outside or OVERFLOW_ID in outside.values():
        raise RuntimeFailed(
            item, "its id map must map 0 and may not show 65534", actual=str(pairs)[:160]
        )
    return outside
