"""A mount that is kept by a descriptor, and visible only between `attach` and `detach`.

A detached mount (open_tree(2), OPEN_TREE_CLONE) lies in no mount namespace: it costs nobody
else's start anything, nobody finds it by a path, and it ends with its last descriptor, so
with this process. Attached once it cannot be taken back as it is: what is kept from then on
is a clone of the attached one, hence with the same file system and all that was written to
it. (A clone of a detached mount would do without the order below, but needs Linux 6.15.)
"""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

from plugins.image_store.mount.kernel import (
    attach,
    cloned,
    cloned_at,
    make_private,
    unmount,
    unmount_held,
)


class HeldMount:
    """Its owner calls `close`. All methods block (microseconds); from any thread."""

    def __init__(self, mount_fd: int) -> None:
        """`mount_fd`, a detached mount, belongs to the object from now on."""
        self._lock = threading.Lock()
        self._fd: int | None = mount_fd
        # Its successor, while it is attached.
        self._next_fd: int | None = None

    @classmethod
    def taken_from(cls, place: bytes) -> HeldMount:
        """Take what is mounted at `place` away and keep it. Raises `OSError`; it stays then."""
        held = cls(cloned_at(place))
        try:
            # Lazily: a child that another thread just forked has our descriptors until its exec.
            unmount(place, lazily=True)
        except OSError:
            held.close()
            raise
        return held

    def attach(self, target: Path) -> None:
        """Make it visible at `target`, cut off from other namespaces. Raises `OSError`.

        Nothing is visible at `target` then. If the kernel moves the mount, but refuses the
        clone (no memory, no descriptor left), the mount is lost: later calls say EINVAL.
        """
        with self._lock:
            if self._fd is None:
                raise OSError(errno.EBADF, "the mount was closed", str(target))
            if self._next_fd is not None:
                raise OSError(errno.EBUSY, "the mount is attached already", str(target))
            attach(self._fd, os.fsencode(target))
            try:
                # On a shared parent it has just become shared itself, as its clone would be.
                make_private(self._fd)
                # Here, not in `detach`: a start may fail, taking away may not.
                self._next_fd = cloned(self._fd)
            except BaseException:
                unmount_held(self._fd)
                raise

    def detach(self) -> None:
        """Take it away from where it was attached, if it was; who still uses it may go on.

        Raises `OSError` if it may still be visible; the mount can be attached again even so.
        """
        with self._lock:
            self._detach()

    def close(self) -> None:
        """Detach and let go of it. Idempotent. Raises `OSError` if it may still be visible."""
        with self._lock:
            try:
                self._detach()
            finally:
                if self._fd is not None:
                    os.close(self._fd)
                    self._fd = None

    def _detach(self) -> None:
        if self._fd is None or self._next_fd is None:
            return
        attached_fd, self._fd, self._next_fd = self._fd, self._next_fd, None
        try:
            unmount_held(attached_fd)
        finally:
            os.close(attached_fd)
