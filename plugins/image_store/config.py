"""The operator's settings of the image store. They are measured and travel in the evidence."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Bytes = Annotated[int, msgspec.Meta(ge=4096, le=2**44)]
# An index says no more of one file (EROFS, chunk sizes), and a tar can be one file.
TarBytes = Annotated[int, msgspec.Meta(ge=4096, le=2**40)]
Count = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
IdShift = Literal["auto", "idmap", "copy"]
MountWay = Literal["auto", "erofs", "unpack"]


class RegistryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one registry is reached; its name (HOST or HOST:PORT) is the table's.

    `mirrors`: names of registries that are asked first, in order. `ca_file`: PEM roots that
    replace the system's. `plain_http`: no TLS; without it only loopback is spoken to plainly.
    """

    mirrors: tuple[str, ...] = ()
    ca_file: str | None = None
    plain_http: bool = False


class StoreConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where layers may come from, where they lie, and what of the TD's memory they may take.

    `file_roots`: absolute directories; a file is read only if it lies in one of them.
    `registries`: tables by name; only these are asked, `[...registries."*"]` stands for all
    others. With neither only uploads bring layers in. `registry_auth_file`: a docker
    config.json, read at each transfer; its contents are not measured.

    `storage_dir`: a directory on storage with authenticated encryption for the layers' tars;
    none: RAM. `budget_bytes` bounds all layers together; a container with a writable root
    needs `writable_bytes` more. `max_layer_bytes` bounds one uncompressed tar, `max_entries`
    the files and directories of one layer, `parallel_layers` the transfers at one time.

    `mount`: layers are mounted through an index over their tars ("erofs"), unpacked into
    tmpfs ("unpack"), or the first of these that the kernel can do ("auto"). `id_shift` says
    how a container sees its layers' owners: through idmapped mounts ("idmap"), through a copy
    of the tree with shifted owners ("copy"), or by the first that the kernel can do ("auto").
    """

    file_roots: tuple[str, ...] = ()
    registries: dict[str, RegistryConfig] = {}
    registry_auth_file: str | None = None
    storage_dir: str | None = None
    budget_bytes: Bytes = 4 * 2**30
    max_layer_bytes: TarBytes = 2 * 2**30
    max_entries: Count = 250_000
    max_uploads: Count = 64
    parallel_layers: Count = 2
    writable_bytes: Bytes = 64 * 2**20
    mount: MountWay = "auto"
    id_shift: IdShift = "auto"
