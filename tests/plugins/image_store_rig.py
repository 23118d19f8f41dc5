"""A running `image_store` over a folder of the test's own, and tars to feed it."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import stat
import tarfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import structlog
from image_store_fixtures import CHOSEN

from plugins.image_store import ImageStore
from plugins.image_store.config import StoreConfig
from plugins.image_store.mount.kernel import mounts_under
from plugins.image_store.store import Store
from supervisor import Event, FileBlob, IdMap, PluginContext, Rootfs, StoredLayer, VerifiedLayer
from supervisor.formats.digest import Digest, digest_of

FIRST_ID = 100_000
ID_MAP = IdMap(pairs=((0, FIRST_ID), (1, FIRST_ID + 1), (33, FIRST_ID + 2)))
Entry = tuple[tarfile.TarInfo, bytes]


def entry(
    name: str,
    data: bytes = b"",
    *,
    kind: bytes = tarfile.REGTYPE,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: float = 0,
    link: str = "",
    device: tuple[int, int] = (0, 0),
    pax: Mapping[str, str] | None = None,
) -> Entry:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.mode, info.mtime = len(data), kind, mode, mtime
    info.uid, info.gid, info.linkname = uid, gid, link
    info.devmajor, info.devminor = device
    info.pax_headers = dict(pax or {})
    return info, data


def folder(name: str, *, mode: int = 0o755, uid: int = 0, mtime: float = 0) -> Entry:
    return entry(name, kind=tarfile.DIRTYPE, mode=mode, uid=uid, mtime=mtime)


def symlink(name: str, target: str) -> Entry:
    return entry(name, kind=tarfile.SYMTYPE, link=target, mode=0o777)


def hard_link(name: str, target: str) -> Entry:
    return entry(name, kind=tarfile.LNKTYPE, link=target)


def make_tar(*entries: Entry, tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tar_format) as archive:
        for info, data in entries:
            archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def raw_header(name: bytes, *, kind: bytes = b"0", size: bytes = b"0", **fields: bytes) -> bytes:
    """One ustar header as bytes, for what no library would write; the checksum is right."""
    block = bytearray(512)
    layout = {
        "mode": (100, b"0000644"),
        "uid": (108, b"0"),
        "gid": (116, b"0"),
        "mtime": (136, b"0"),
        "linkname": (157, b""),
        "magic": (257, b"ustar\x0000"),
        "prefix": (345, b""),
    }
    block[: len(name)] = name
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    for key, (offset, default) in layout.items():
        value = fields.get(key, default)
        block[offset : offset + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


END = bytes(1024)


class Layout:
    """An OCI layout folder that the test fills."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "blobs" / "sha256").mkdir(parents=True)

    def add(
        self,
        blob: bytes,
        *,
        media_type: str = "application/vnd.oci.image.layer.v1.tar+gzip",
        size_bytes: int | None = None,
        blob_digest: str | None = None,
    ) -> FileBlob:
        hex_digest = hashlib.sha256(blob).hexdigest()
        (self.directory / "blobs" / "sha256" / hex_digest).write_bytes(blob)
        return FileBlob(
            file=str(self.directory / "blobs" / "sha256" / hex_digest),
            blob_digest=f"sha256:{hex_digest}" if blob_digest is None else blob_digest,
            media_type=media_type,
            size_bytes=len(blob) if size_bytes is None else size_bytes,
        )

    def add_gzip(self, tar: bytes) -> FileBlob:
        return self.add(gzip.compress(tar, mtime=0))


class ShownRoot:
    """A root, and the folder `path` where it is attached until it is hidden or closed."""

    def __init__(self, root: Rootfs, path: Path) -> None:
        self.root = root
        self.path = path
        path.mkdir(parents=True)
        root.attach(path)

    def hide(self) -> None:
        self.root.detach()
        self.path.rmdir()

    async def close(self) -> None:
        if self.path.exists():
            self.hide()
        await self.root.close()


class Rig:
    """A store that is open, and what it reported. Roots are shown below `shown_dir`."""

    def __init__(self, plugin: ImageStore, store: Store, runtime_dir: Path) -> None:
        self.plugin = plugin
        self.store = store
        self.runtime_dir = runtime_dir
        self.shown_dir = runtime_dir.parent / "shown"
        self.events: list[Event] = []

    async def send(self, tar: bytes, *, size_bytes: int | None = None) -> StoredLayer:
        upload = await self.store.upload(digest_of("sha384", tar), size_bytes=size_bytes)
        await upload.write(tar)
        return await upload.finish()

    async def add(self, tar: bytes) -> VerifiedLayer:
        layer = verified(await self.send(tar))
        await self.store.prepare(layer)
        return layer

    async def mount(
        self,
        *layers: VerifiedLayer,
        container_id: int = 1,
        id_map: IdMap = ID_MAP,
        writable: bool = False,
    ) -> ShownRoot:
        root = await self.store.mount(
            layers, container_id=container_id, id_map=id_map, writable=writable
        )
        return ShownRoot(root, self.shown_dir / str(container_id))

    def mounts(self) -> list[str]:
        """Below the store's own tmpfs, relative to it."""
        top = os.fsencode(self.runtime_dir / "store")
        return [
            os.fsdecode(os.path.relpath(point, top)) for point in mounts_under(top) if point != top
        ]

    def root_mounts(self) -> list[str]:
        """Of these, those that belong to containers."""
        return [point for point in self.mounts() if point.startswith("roots/")]

    def leftovers(self) -> tuple[list[str], list[str], list[str], int]:
        """What should be empty or zero when nothing is kept: mounts, folders, files, bytes."""
        store = self.runtime_dir / "store"
        return (
            self.mounts(),
            sorted(os.listdir(store / "layers")),
            sorted(os.listdir(store / "roots")),
            self.store.budget.used_bytes,
        )


NOTHING: tuple[list[str], list[str], list[str], int] = ([], [], [], 0)


def verified(stored: StoredLayer) -> VerifiedLayer:
    """As `supervisor.layers` would, had it compared the digests."""
    layer: VerifiedLayer = VerifiedLayer._create(stored)
    return layer


def memory_files() -> int:
    """Layers' memfds that this process holds."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:layer")
        except FileNotFoundError:
            continue
    return count


def descriptors() -> int:
    """How many this process has; a mount that nobody closed would be one of them."""
    return len(os.listdir("/proc/self/fd"))


def make_plugin(runtime_dir: Path, events: list[Event], **settings: object) -> ImageStore:
    runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    context = PluginContext(
        name="image_store",
        runtime_dir=runtime_dir,
        log=structlog.stdlib.get_logger("image_store"),
        report=events.append,
    )
    return ImageStore(msgspec.convert(settings, StoreConfig), context)


@asynccontextmanager
async def running(tmp_path: Path, **settings: object) -> AsyncIterator[Rig]:
    """The store, open; when the body ends nothing of it may be left."""
    events: list[Event] = []
    settings = {
        "mount": CHOSEN.mount,
        "budget_bytes": 64 << 20,
        "max_layer_bytes": 16 << 20,
        "writable_bytes": 4 << 20,
        **settings,
    }
    runtime_dir = tmp_path / "image_store"
    plugin = make_plugin(runtime_dir, events, **settings)
    store = await plugin.layer_store()
    assert isinstance(store, Store)
    rig = Rig(plugin, store, runtime_dir)
    rig.events = events
    async with store.opened():
        yield rig
    assert mounts_under(os.fsencode(tmp_path)) == []
    for left in rig.shown_dir.glob("*"):
        left.rmdir()
    assert list(runtime_dir.iterdir()) == []
    assert store.budget.used_bytes == 0


def expected_for(data: bytes, algorithm: str = "sha384") -> Digest:
    return digest_of(algorithm, data)


def snapshot(root: Path, *, skip: Sequence[str] = ()) -> dict[str, tuple[object, ...]]:
    """Everything that a program could see of a tree, hard links as the set of their names."""
    seen: dict[str, tuple[object, ...]] = {}
    names: dict[int, list[str]] = {}
    for directory, folders, files in os.walk(root):
        for name in [".", *folders, *files] if directory == str(root) else [*folders, *files]:
            path = os.path.join(directory, name)
            relative = os.path.relpath(path, root)
            if relative.split("/")[0] in skip:
                continue
            status = os.lstat(path)
            content: object = None
            xattrs: object = None
            if stat.S_ISREG(status.st_mode):
                content = Path(path).read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            if not stat.S_ISLNK(status.st_mode):
                xattrs = {
                    key: os.getxattr(path, key)
                    for key in os.listxattr(path)
                    if not key.startswith("trusted.overlay.")
                }
            seen[relative] = (
                status.st_mode,
                status.st_uid,
                status.st_gid,
                None if relative == "." else status.st_mtime_ns,
                status.st_rdev,
                content,
                xattrs,
            )
            if not stat.S_ISDIR(status.st_mode) and status.st_nlink > 1:
                names.setdefault(status.st_ino, []).append(relative)
    for group in names.values():
        for relative in group:
            seen[relative] = (*seen[relative], tuple(sorted(group)))
    return seen
