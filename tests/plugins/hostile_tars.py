"""Tars that nobody but an attacker would write, with the rule that refuses each."""

from __future__ import annotations

import struct
import tarfile

from image_store_rig import (
    END,
    Entry,
    entry,
    folder,
    hard_link,
    make_tar,
    padded,
    raw_header,
    symlink,
)
from image_store_trees import MAX_ENTRIES

CAPABILITY = struct.pack("<5I", 0x02000001, 1, 0, 0, 0).decode()


def pax(name: str, **records: str) -> Entry:
    return entry(name, pax=records)


def xattr(name: str, value: str = "v") -> bytes:
    return make_tar(entry("f", pax={f"SCHILY.xattr.{name}": value}))


def xattr_on(made: Entry, name: str = "security.capability") -> bytes:
    made[0].pax_headers = {f"SCHILY.xattr.{name}": CAPABILITY}
    return make_tar(made)


def device(numbers: tuple[int, int]) -> Entry:
    return entry("f", kind=tarfile.CHRTYPE, device=numbers)


def pax_record(key: bytes, value: bytes) -> bytes:
    body = b" " + key + b"=" + value + b"\n"
    length = len(body)
    while len(b"%d" % length) + len(body) != length:
        length = len(b"%d" % length) + len(body)
    return b"%d" % length + body


def extended(kind: bytes, data: bytes, following: bytes = b"") -> bytes:
    header = raw_header(b"././@x", kind=kind, size=b"%o" % len(data))
    return header + padded(data) + (following or raw_header(b"f")) + END


def sized(name: str, *, says: str, data: bytes = b"12345") -> bytes:
    """A file whose pax header says another size than its own, and a file behind it."""
    header = extended(b"x", pax_record(b"size", says.encode()), raw_header(b"f", size=b"5"))
    return header[:-1024] + padded(data) + raw_header(b"g") + END


def sized_symlink() -> bytes:
    """Data that only the pax header tells of, which GNU tar skips and others read as headers."""
    symlink_header = raw_header(b"f", kind=b"2", linkname=b"a", size=b"20")
    return extended(b"x", pax_record(b"size", b"16"), symlink_header)


def nul_attribute() -> bytes:
    return extended(b"x", pax_record(b"SCHILY.xattr.user.a\0b", b""))


def summed_wrongly(off_by: int) -> bytes:
    """So many high bytes that the sum is beyond 65521, where Adler-32's sums begin anew."""
    block = bytearray(raw_header(b"\xff" * 100, linkname=b"\xff" * 100, prefix=b"\xff" * 155))
    total = sum(block[:148]) + 8 * ord(" ") + sum(block[156:])
    assert total > 65521
    block[148:156] = b"%06o\0 " % (total - off_by)
    return bytes(block) + END


def link_attribute(name: str) -> bytes:
    """An attribute on a second name."""
    linked = hard_link("f", "a")
    linked[0].pax_headers = {f"SCHILY.xattr.{name}": "v"}
    return make_tar(entry("a"), linked)


NULL_DEVICE = entry("null", kind=tarfile.CHRTYPE, device=(1, 3))
CAPABILITY_V3 = struct.pack("<IIIIII", 0x03000001, 1, 0, 0, 0, 7).decode()
CAPABILITY_CUT = struct.pack("<5I", 0x03000001, 1, 0, 0, 0).decode()

# (what it is, the tar, part of the rule that refuses it, part of the item)
REFUSED = [
    ("climbing", make_tar(entry("../f")), "climb", "'../f'"),
    ("climbing at the end", make_tar(entry("a/..")), "climb", "'a/..'"),
    ("climbing whiteout", make_tar(entry("../.wh.f")), "climb", "'../.wh.f'"),
    ("climbing to itself", make_tar(entry("a/../f")), "climb", "'a/../f'"),
    ("climbing inside", make_tar(entry("a/../../f")), "climb", "'a/../../f'"),
    ("below a symlink", make_tar(symlink("d", "/etc"), entry("d/f")), "lies below 'd'", "'d/f'"),
    ("below a file", make_tar(entry("d"), entry("d/e/f")), "lies below 'd'", "'d/e/f'"),
    (
        "below a hard link",
        make_tar(entry("a"), hard_link("b", "a"), entry("b/f")),
        "lies below 'b'",
        "'b/f'",
    ),
    (
        "below what was a directory",
        make_tar(folder("d"), entry("d/e/f"), symlink("d", "/etc"), entry("d/e/g")),
        "lies below 'd'",
        "'d/e/g'",
    ),
    (
        "in what was the last directory",
        make_tar(folder("d"), entry("d/f"), entry("d"), entry("d/g")),
        "lies below 'd'",
        "'d/g'",
    ),
    ("below a device", make_tar(NULL_DEVICE, entry("null/f")), "lies below 'null'", "'null/f'"),
    ("hard link climbing inside", make_tar(entry("a"), hard_link("f", "d/../a")), "climb", "'f'"),
    ("hard link to itself", make_tar(hard_link("f", "f")), "earlier entry", "'f'"),
    ("hard link to the root", make_tar(hard_link("f", "/")), "no directory", "'f'"),
    ("hard link without target", make_tar(hard_link("f", "")), "no directory", "'f'"),
    (
        "hard link to what was replaced",
        make_tar(folder("d"), entry("d/a"), entry("d"), hard_link("f", "d/a")),
        "earlier entry",
        "'f'",
    ),
    (
        "hard link to a whiteout",
        make_tar(entry(".wh.a"), hard_link("f", "a")),
        "earlier entry",
        "'f'",
    ),
    ("hard link as root", make_tar(entry("a"), hard_link("./", "a")), "root must be", "'./'"),
    ("hard link outside", make_tar(hard_link("f", "../../etc/passwd")), "climb", "'f'"),
    ("hard link to nothing", make_tar(hard_link("f", "/etc/passwd")), "earlier entry", "'f'"),
    ("hard link to later", make_tar(hard_link("f", "g"), entry("g")), "earlier entry", "'f'"),
    ("hard link to a directory", make_tar(folder("d"), hard_link("f", "d")), "no directory", "'f'"),
    (
        "hard link through a symlink",
        make_tar(folder("d"), entry("d/g"), symlink("s", "d"), hard_link("f", "s/g")),
        "earlier entry",
        "'f'",
    ),
    ("hard link with data", raw_header(b"f", kind=b"1", size=b"5"), "only a file", "'f'"),
    ("symlink with data", raw_header(b"f", kind=b"2", size=b"5"), "only a file", "'f'"),
    ("directory with data", raw_header(b"f", kind=b"5", size=b"5"), "only a file", "'f'"),
    ("device with data", raw_header(b"f", kind=b"3", size=b"5"), "only a file", "'f'"),
    ("disk with data", raw_header(b"f", kind=b"4", size=b"5"), "only a file", "'f'"),
    ("pipe with data", raw_header(b"f", kind=b"6", size=b"5"), "only a file", "'f'"),
    ("folder by name with data", raw_header(b"f/", size=b"5"), "only a file", "'f/'"),
    ("symlink through pax with data", sized_symlink(), "only a file", "'f'"),
    ("empty symlink", make_tar(symlink("f", "")), "1 to 4095", "'f'"),
    ("endless symlink", make_tar(symlink("f", "x" * 4096)), "1 to 4095", "'f'"),
    ("NUL in a pax path", extended(b"x", pax_record(b"path", b"a\0b")), "no NUL", "offset"),
    ("NUL in a long name", extended(b"L", b"a\0b"), "no NUL", "offset"),
    ("NUL in a pax link", extended(b"x", pax_record(b"linkpath", b"a\0b")), "no NUL", "offset"),
    ("NUL in a long link", extended(b"K", b"a\0b"), "no NUL", "offset"),
    ("no name at all", raw_header(b""), "root must be a directory", "''"),
    ("an empty long name", extended(b"L", b""), "root must be a directory", "''"),
    ("4,096 directories deep", make_tar(entry("d/" * 4096 + "f")), "4095 bytes", "'d/d/"),
    ("deep whiteout", make_tar(entry("d/" * 2047 + ".wh.ff")), "4095 bytes", "'d/d/"),
    ("long component on the way", make_tar(entry("x" * 256 + "/f")), "255 bytes", "'xxx"),
    ("long whiteout", make_tar(entry(".wh." + "x" * 256)), "255 bytes", "'.wh.xxx"),
    ("long component", make_tar(entry("x" * 256)), "255 bytes", "'xxx"),
    ("long path", make_tar(entry("/".join(["d" * 250] * 17))), "4095 bytes", "'ddd"),
    ("root as a file", raw_header(b"./"[:1]), "root must be a directory", "'.'"),
    ("whiteout of nothing", make_tar(entry("d/.wh.")), "name what it hides", "'d/.wh.'"),
    ("whiteout of .", make_tar(entry("d/.wh..")), "name what it hides", "'d/.wh..'"),
    ("whiteout of ..", make_tar(entry(".wh...")), "name what it hides", "'.wh...'"),
    ("below a whiteout", make_tar(entry(".wh.d/f")), "no directory", "'.wh.d/f'"),
    ("below a whiteout of below", make_tar(entry(".wh.d/.wh.f")), "no directory", "'.wh.d/.wh.f'"),
    (
        "below an opaque marker",
        make_tar(entry(".wh..wh..opq/f")),
        "no directory",
        "'.wh..wh..opq/f'",
    ),
    ("major number", make_tar(device((4096, 0))), "device major is out", "'f'"),
    ("minor number", make_tar(device((1, 2**20))), "device minor is out", "'f'"),
    ("forged whiteout", make_tar(entry("f", kind=tarfile.CHRTYPE)), "forged whiteout", "'f'"),
    ("device number", raw_header(b"f", kind=b"3", magic=b"        "), "only ustar", "'f'"),
    ("redirect on a link", link_attribute("trusted.overlay.redirect"), "forged", "'f'"),
    ("foreign on a link", link_attribute("trusted.x"), "only attributes user.*", "'f'"),
    ("capability on a directory", xattr_on(folder("f")), "revision 2, on a file", "'f/'"),
    ("capability on a symlink", xattr_on(symlink("f", "a")), "revision 2, on a file", "'f'"),
    ("short capability", xattr("security.capability", "v"), "revision 2", "'f'"),
    ("attribute without name", xattr(""), "only attributes user.*", "'f'"),
    ("access control list", xattr("system.posix_acl_access"), "only attributes user.*", "'f'"),
    ("NUL in an attribute's name", nul_attribute(), "255 bytes", "'f'"),
    (
        "attribute on the root",
        xattr_on(folder("./"), "trusted.x"),
        "only attributes user.*",
        "'./'",
    ),
    ("redirect", xattr("trusted.overlay.redirect"), "forged", "'f'"),
    ("user redirect", xattr("user.overlay.opaque"), "forged", "'f'"),
    ("foreign attribute", xattr("trusted.x"), "only attributes user.*", "'f'"),
    ("foreign label", xattr("security.apparmor"), "only attributes user.*", "'f'"),
    ("capability revision", xattr("security.capability", CAPABILITY_V3), "revision 2", "'f'"),
    ("capability cut off", xattr("security.capability", CAPABILITY_CUT), "revision 2", "'f'"),
    ("nameless attribute", xattr("user."), "has a name", "'f'"),
    ("long attribute name", xattr("user." + "x" * 251), "255 bytes", "'f'"),
    ("long attribute", xattr("user.x", "x" * 65536), "64 KiB", "'f'"),
    (
        "attribute flood",
        make_tar(entry("f", pax={f"SCHILY.xattr.user.{i:0240}": "" for i in range(300)})),
        "all attributes",
        "'f'",
    ),
    (
        "attribute flood of values",
        make_tar(entry("f", pax={f"SCHILY.xattr.user.{i}": "x" * 60_000 for i in range(3)})),
        "together",
        "'f'",
    ),
    (
        "attribute on a pipe",
        make_tar(entry("f", kind=tarfile.FIFOTYPE, pax={"SCHILY.xattr.user.x": ""})),
        "only files and directories",
        "'f'",
    ),
    ("sparse, old GNU", raw_header(b"f", kind=b"S"), "sparse", "'f'"),
    ("sparse, pax 0.1", make_tar(pax("f", **{"GNU.sparse.map": "0,1"})), "sparse", "offset"),
    ("sparse, pax", make_tar(pax("f", **{"GNU.sparse.major": "1"})), "sparse", "offset"),
    ("volume label", raw_header(b"f", kind=b"V"), "not known", "'f'"),
    ("unknown type", raw_header(b"f", kind=b"\xff"), "not known", "'f'"),
    ("bad checksum", raw_header(b"f")[:-1] + b"x", "checksum", "offset"),
    ("checksum of another sum", summed_wrongly(65521), "checksum", "offset"),
    ("checksum in octal", raw_header(b"f")[:148] + b"999999\0 " + bytes(356), "octal", "offset"),
    ("no header at all", b"x" * 512, "octal", "offset"),
    ("truncated header", raw_header(b"f")[:300], "truncated", "offset"),
    ("truncated data", raw_header(b"f", size=b"2000") + bytes(512), "inside the archive", "'f'"),
    ("truncated padding", raw_header(b"f", size=b"5") + b"12345", "inside the archive", "'f'"),
    ("truncated end", raw_header(b"f") + bytes(512) + bytes(100), "truncated", "'f'"),
    ("lone zero block first", bytes(512) + raw_header(b"g") + END, "lone zero block", "offset"),
    (
        "lone zero block",
        raw_header(b"f") + bytes(512) + raw_header(b"g") + END,
        "lone zero block",
        "'f'",
    ),
    ("negative size", raw_header(b"f", size=b"\xff" * 12), "size is out of range", "'f'"),
    (
        "huge size",
        raw_header(b"f", size=b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7),
        "inside the archive",
        "'f'",
    ),
    ("size in nines", raw_header(b"f", size=b"00000000009"), "octal", "'f'"),
    ("size with a point", raw_header(b"f", size=b"1.0"), "octal", "'f'"),
    ("negative mode", raw_header(b"f", mode=b"\xff" * 8), "mode is out of range", "'f'"),
    ("negative extension", raw_header(b"x", kind=b"x", size=b"\xff" * 12), "size is", "offset"),
    ("extension cut off", raw_header(b"x", kind=b"x", size=b"7000"), "inside", "offset"),
    ("size with sign", raw_header(b"f", size=b"-1"), "octal", "'f'"),
    ("size with underscore", raw_header(b"f", size=b"1_0"), "octal", "'f'"),
    ("size with prefix", raw_header(b"f", size=b"0o7"), "octal", "'f'"),
    ("uid -1", raw_header(b"f", uid=b"\xff" * 8), "uid is out of range", "'f'"),
    ("uid 2^32-1", make_tar(pax("f", uid="4294967295")), "uid is out of range", "'f'"),
    ("mtime", raw_header(b"f", mtime=b"\x80\x7f" + b"\xff" * 10), "mtime is out", "'f'"),
    ("pax size that lies", sized("f", says="999999"), "must agree", "'f'"),
    ("pax size that hides a header", sized("f", says="1024"), "must agree", "'f'"),
    ("pax size that shows data", sized("f", says="0"), "must agree", "'f'"),
    ("pax size in the same block", sized("f", says="6"), "must agree", "'f'"),
    ("pax size beyond all", sized("f", says=str(2**63)), "size is out of range", "'f'"),
    ("pax size below 8 GiB", sized("f", says=str(2**33 - 1)), "must agree", "'f'"),
    ("pax size of 8 GiB", sized("f", says=str(2**33)), "inside the archive", "'f'"),
    ("negative pax size", extended(b"x", pax_record(b"size", b"-1")), "decimal", "offset"),
    ("endless pax size", extended(b"x", pax_record(b"size", b"1" * 21)), "decimal", "offset"),
    ("negative pax uid", extended(b"x", pax_record(b"uid", b"-1")), "decimal", "offset"),
    ("pax gid", make_tar(pax("f", gid=str(2**32 - 1))), "gid is out of range", "'f'"),
    ("pax mtime", make_tar(pax("f", mtime="9" * 20)), "mtime is out", "'f'"),
    ("pax mtime before", make_tar(pax("f", mtime="-" + "9" * 20)), "mtime is out", "'f'"),
    ("pax size as text", extended(b"x", pax_record(b"size", b"+5")), "decimal", "offset"),
    ("pax mtime as text", extended(b"x", pax_record(b"mtime", b"1e9")), "seconds", "offset"),
    ("pax length that lies", extended(b"x", b"99 path=f\n"), "pax record", "offset"),
    ("pax length of zero", extended(b"x", b"0 path=f\n"), "begins with its length", "offset"),
    ("pax length of letters", extended(b"x", b"a path=f\n"), "begins with its", "offset"),
    ("pax length with sign", extended(b"x", b"+9 path=f\n"), "begins with its", "offset"),
    ("pax length of itself", extended(b"x", b"2 \n"), "pax record", "offset"),
    ("pax length within itself", extended(b"x", b"11 path=f\n"[:1] + b" a=b\n"), "pax", "offset"),
    ("pax without end", extended(b"x", b"1" * 600), "begins with its", "offset"),
    ("pax without equals", extended(b"x", b"7 path\n"), "pax record", "offset"),
    ("pax without newline", extended(b"x", b"9 path=fx"), "pax record", "offset"),
    ("pax without key", extended(b"x", b"5 =f\n"), "pax record", "offset"),
    ("global path", extended(b"g", pax_record(b"path", b"f")), "global", "offset"),
    ("global size", extended(b"g", pax_record(b"size", b"1")), "global", "offset"),
    ("global sparse", extended(b"g", pax_record(b"GNU.sparse.name", b"")), "global", "offset"),
    ("global xattr", extended(b"g", pax_record(b"SCHILY.xattr.a", b"")), "global", "offset"),
    (
        "two pax headers",
        extended(b"x", b"", extended(b"x", b"")),
        "only one extended header",
        "offset",
    ),
    (
        "two names",
        extended(b"L", b"a", extended(b"x", pax_record(b"path", b"b"))),
        "not by both",
        "offset",
    ),
    (
        "two long names",
        extended(b"L", b"a", extended(b"L", b"b")),
        "only one extended header",
        "offset",
    ),
    (
        "nothing after a long link",
        raw_header(b"x", kind=b"K") + END,
        "followed by its entry",
        "offset",
    ),
    (
        "nothing after pax",
        raw_header(b"x", kind=b"x") + END,
        "followed by its entry",
        "offset",
    ),
    (
        "long extended header",
        extended(b"x", bytes(2**20 + 1)),
        "extended header is too long",
        "offset",
    ),
    ("header flood", raw_header(b"g", kind=b"g") * (4 * MAX_ENTRIES + 1), "too many", "offset"),
]
