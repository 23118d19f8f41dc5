"""The operator's settings of the image store. They are measured and travel in the evidence."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Bytes = Annotated[int, msgspec.Meta(ge=4096, le=2**44)]
Count = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
IdShift = Literal["auto", "idmap", "copy"]


class StoreConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bounds on what layers may take of the TD's memory, and where their blobs may lie.

    `oci_roots`: absolute directories; an OCI layout is read only if it lies in one of
    them, and with none given only uploads bring layers in. `budget_bytes` bounds all
    layers together: a layer needs its tar and its unpacked tree at the same time while
    it is prepared, its tree alone afterwards; a container with a writable root needs
    `writable_bytes` more. `max_layer_bytes` bounds one uncompressed tar, `max_entries`
    the files and directories of one layer. `id_shift` says how a container sees its
    layers' owners: through idmapped mounts ("idmap"), through a copy of the tree with
    shifted owners ("copy"), or by the first of these that the kernel can do ("auto").
    """

    oci_roots: tuple[str, ...] = ()
    budget_bytes: Bytes = 4 * 2**30
    max_layer_bytes: Bytes = 2 * 2**30
    max_entries: Count = 250_000
    max_uploads: Count = 64
    parallel_layers: Count = 2
    writable_bytes: Bytes = 64 * 2**20
    id_shift: IdShift = "auto"
