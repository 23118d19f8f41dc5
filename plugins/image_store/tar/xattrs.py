"""Which extended attributes of a layer are kept, passed over, or refused.

Image builders write user.* and security.capability (Docker, BuildKit and Buildah alike).
Labels for the security modules of the machine that built the image mean nothing in this
one; umoci leaves SELinux's out too. All else is refused: trusted.* and *.overlay.* steer
overlayfs, and without its access control list a file would have other permissions.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping

from plugins.image_store.tar.node import NO_XATTRS

MAX_XATTR_NAME_BYTES = 255
MAX_XATTR_NAMES_BYTES = 64 * 1024  # listxattr(2) fails beyond
MAX_XATTR_VALUE_BYTES = 64 * 1024 - 1
# With each attribute's own overhead it fits into an EROFS inode's 256 KiB.
MAX_XATTRS_BYTES = 128 * 1024
USER = b"user."
CAPABILITY = b"security.capability"
CAPABILITY_V2_BYTES = 20  # linux/capability.h: XATTR_CAPS_SZ_2
_FOREIGN_LABELS = frozenset({b"security.selinux", b"security.ima", b"security.evm"})


class XattrRefused(Exception):
    """`rule` in words; `name` of the attribute, if it is one."""

    def __init__(self, rule: str, name: bytes | None = None) -> None:
        super().__init__(rule, name)
        self.rule = rule
        self.name = name


def kept_xattrs(
    xattrs: Mapping[bytes, bytes], *, mode: int, is_hard_link: bool
) -> Mapping[bytes, bytes]:
    """What a file of this `mode` gets. Raises `XattrRefused`.

    A hard link gets nothing, since the file has its attributes from its first entry (as GNU
    tar does it), though builders repeat them there; they are judged all the same.
    """
    names_bytes = values_bytes = 0
    kept: dict[bytes, bytes] = {}
    for name, value in xattrs.items():
        names_bytes += len(name) + 1
        values_bytes += len(value)
        if b"\0" in name or len(name) > MAX_XATTR_NAME_BYTES:
            raise XattrRefused(
                f"an attribute's name has at most {MAX_XATTR_NAME_BYTES} bytes", name
            )
        if b".overlay." in name:
            raise XattrRefused("overlayfs attributes are forged whiteouts", name)
        if name in _FOREIGN_LABELS:
            continue
        if not name.startswith(USER) and name != CAPABILITY:
            raise XattrRefused("only attributes user.* and security.capability are kept", name)
        if len(name) == len(USER) or len(value) > MAX_XATTR_VALUE_BYTES:
            raise XattrRefused("an attribute has a name and at most 64 KiB", name)
        if not is_hard_link:
            _check_place(name, value, mode)
            kept[name] = value
    if names_bytes > MAX_XATTR_NAMES_BYTES:
        raise XattrRefused("the names of all attributes have at most 64 KiB")
    if names_bytes + values_bytes > MAX_XATTRS_BYTES:
        raise XattrRefused(f"all attributes have at most {MAX_XATTRS_BYTES} bytes together")
    return kept or NO_XATTRS


def _check_place(name: bytes, value: bytes, mode: int) -> None:
    is_file = stat.S_ISREG(mode)
    if name == CAPABILITY:
        # VFS_CAP_REVISION_2, little-endian; revision 3 would name a foreign user namespace.
        if not is_file or len(value) != CAPABILITY_V2_BYTES or value[3] != 2:
            raise XattrRefused("a capability is of revision 2, on a file", name)
    elif not is_file and not stat.S_ISDIR(mode):
        raise XattrRefused("only files and directories have attributes", name)
