"""Finds out how layers can be shown on this machine: by showing two, and looking at them."""

from __future__ import annotations

import io
import os
import tarfile
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import msgspec
import structlog
import trio

from plugins.image_store.arrival.sealed import SealedTar, SealedWriter
from plugins.image_store.arrival.storage import Storage
from plugins.image_store.budget import Budget
from plugins.image_store.config import StoreConfig
from plugins.image_store.layer import KeptLayer, Layer, Preparation
from plugins.image_store.mount.held import HeldMount
from plugins.image_store.mount.kernel import refused_by_kernel
from plugins.image_store.mount.memory_files import MemoryFiles
from plugins.image_store.mount.prepared import How, PreparedLayer
from plugins.image_store.mount.removal import remove_all
from plugins.image_store.mount.rootfs import RootPlan, outside_ids
from plugins.image_store.mount.roots import assemble_root
from plugins.image_store.work import check_cancelled, clean_up
from supervisor import IdMap, RuntimeFailed
from supervisor.formats.digest import digest_of

ITEM = "trial of the image store"
_BUDGET_BYTES = 16 << 20
_MAX_ENTRIES = 100
_FREE_TIMEOUT_S = 2.0
_ID_MAP = IdMap(pairs=((0, 1_000_000_000),))
# More than a block, so that a wrong offset shows.
_CONTENT = b"".join(b"line %d\n" % number for number in range(200))
_SHOWN = {"file": _CONTENT, "folder/new": b"new"}


class Way(msgspec.Struct, frozen=True):
    """How layers become visible, and how containers come to see their own owners in them."""

    mount: How
    id_shift: Literal["idmap", "copy"]

    def __str__(self) -> str:
        return f'mount = "{self.mount}" with id_shift = "{self.id_shift}"'


def ways_of(config: StoreConfig) -> tuple[Way, ...]:
    """What the settings allow, best first: a copy for every container is the worst."""
    return tuple(
        Way(mount, id_shift)
        for id_shift in ("idmap", "copy")
        for mount in ("erofs", "unpack")
        if config.mount in ("auto", mount) and config.id_shift in ("auto", id_shift)
    )


async def first_way(
    config: StoreConfig,
    directory: Path,
    *,
    storage: Storage,
    log: structlog.stdlib.BoundLogger,
) -> Way:
    """The best way that works here; what does not is warned of, with the reason.

    `directory` is made on the way and removed again; it lies where the layers will be shown,
    and the tars lie in `storage`, open, as theirs will. Raises
    `RuntimeFailed` with the kernel's words when none of what `config` allows works.
    """
    reasons: list[str] = []
    for way in ways_of(config):
        try:
            await try_way(way, directory, storage=storage, log=log)
        except RuntimeFailed as error:
            reasons.append(f"{way}: {error}")
            log.warning("way_missing", mount=way.mount, id_shift=way.id_shift, reason=str(error))
        else:
            return way
    raise RuntimeFailed(
        "image_store", "layers cannot be mounted as configured", actual="; ".join(reasons)
    )


async def try_way(
    way: Way, directory: Path, *, storage: Storage, log: structlog.stdlib.BoundLogger
) -> None:
    """Show two small layers to a container that does not exist, and compare what it would see.

    Makes `directory` and removes it. Raises `RuntimeFailed`, `DeadlineExceeded`.
    """
    trial = _Trial(way, directory, storage)
    try:
        lower = await trio.to_thread.run_sync(trial.layer, _lower_tar())
        upper = await trio.to_thread.run_sync(trial.layer, _upper_tar())
        root = await assemble_root(
            RootPlan(
                item=ITEM,
                base=directory / "container",
                layers=(lower, upper),
                outside=outside_ids(_ID_MAP.pairs, item=ITEM),
                user_namespace_fd=None,
                writable_bytes=None,
                max_entries=_MAX_ENTRIES,
                set_aside=Budget(_BUDGET_BYTES).reserve(0, item=ITEM).cover,
            ),
            _ID_MAP,
            idmaps=way.id_shift == "idmap",
            limiter=trio.CapacityLimiter(1),
        )
        trial.hold(root)
        await trio.to_thread.run_sync(trial.compare, root)
    finally:
        await clean_up(ITEM, trial.remove, log=log)


class _Trial:
    """Two layers, and what they must look like together. Blocking."""

    def __init__(self, way: Way, directory: Path, storage: Storage) -> None:
        self._directory = directory
        self._storage = storage
        self._layers: list[Layer] = []
        self._root: HeldMount | None = None
        self._preparation = Preparation(
            how=way.mount,
            budget=Budget(_BUDGET_BYTES),
            memory_files=MemoryFiles(),
            max_entries=_MAX_ENTRIES,
        )

    def layer(self, tar: bytes) -> PreparedLayer:
        self._directory.mkdir(mode=0o700, exist_ok=True)
        key = len(self._layers)
        sealed = self._sealed(tar)
        kept = KeptLayer(
            expected=digest_of("sha384", tar),
            computed=sealed.computed,
            size_bytes=sealed.size_bytes,
            source="trial",
            key=key,
        )
        layer = Layer(kept, sealed, self._directory / str(key))
        self._layers.append(layer)
        return layer.prepare(self._preparation, between=check_cancelled)

    def _sealed(self, tar: bytes) -> SealedTar:
        writer = SealedWriter(
            digest_of("sha384", tar),
            self._preparation.budget.reserve(len(tar), item=ITEM),
            limit_bytes=len(tar),
            limit_rule="as large as it is",
            storage=self._storage,
        )
        try:
            writer.write(tar)
            return writer.seal()
        finally:
            writer.close()

    def hold(self, root: HeldMount) -> None:
        """Have it closed by `remove`."""
        self._root = root

    def compare(self, root: HeldMount) -> None:
        with refused_by_kernel(ITEM, "what was mounted must be readable"):
            seen = self._directory / "seen"
            seen.mkdir(mode=0o700)
            root.attach(seen)
            self._compare(seen)

    def _compare(self, root: Path) -> None:
        _require("owners must be shifted", _ID_MAP.root, (root / "file").stat().st_uid)
        for name, content in _SHOWN.items():
            if (root / name).read_bytes() != content:
                raise RuntimeFailed(ITEM, f"{name} must have the bytes that its tar has")
        _require("an opaque directory hides lower ones", ["new"], os.listdir(root / "folder"))
        _require("a whiteout hides what it names", False, (root / "gone").exists())

    def remove(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._preparation.memory_files.close)
            for layer in self._layers:
                stack.callback(layer.free, timeout_s=_FREE_TIMEOUT_S)
            # All of it at once, since it knows the order: the container's root, then layers.
            stack.callback(remove_all, self._directory)
            if self._root is not None:
                stack.callback(self._root.close)


def _require(rule: str, expected: object, actual: object) -> None:
    if actual != expected:
        raise RuntimeFailed(ITEM, rule, expected=expected, actual=actual)


def _lower_tar() -> bytes:
    return _tar({"file": b"old", "gone": b"old", "folder/old": b"old"})


def _upper_tar() -> bytes:
    return _tar({**_SHOWN, ".wh.gone": b"", "folder/.wh..wh..opq": b""})


def _tar(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()
