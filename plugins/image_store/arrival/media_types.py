"""What a layer's media type says about its bytes.

OCI image specification 1.1, layer.md; Docker's image manifest V2, schema 2; the names of
zstd layers and of encrypted ones as containers' tools write them.
"""

from __future__ import annotations

from typing import Literal

from supervisor import Untrusted

_OCI = "application/vnd.oci.image.layer.v1.tar"
_DOCKER = "application/vnd.docker.image.rootfs.diff.tar"
_COMPRESSIONS: dict[str, Literal["gzip", "zstd"] | None] = {
    _OCI: None,
    f"{_OCI}+gzip": "gzip",
    f"{_OCI}+zstd": "zstd",
    _DOCKER: None,
    f"{_DOCKER}.gzip": "gzip",
    f"{_DOCKER}.zstd": "zstd",
}


def compression_of(media_type: str, *, item: str) -> Literal["gzip", "zstd"] | None:
    """How a layer of `media_type` is compressed; None is a plain tar.

    Raises `Untrusted`, naming `item`, for everything that is no layer or cannot be had.
    """
    if media_type in _COMPRESSIONS:
        return _COMPRESSIONS[media_type]
    rule = "this media type of a layer is not supported"
    if "encrypted" in media_type:
        rule = "encrypted layers are not supported; decrypt the image before it is converted"
    elif "nondistributable" in media_type or "foreign" in media_type:
        rule = "foreign (non-distributable) layers are not supported; their bytes lie elsewhere"
    raise Untrusted(
        item,
        rule,
        expected="a layer as tar, tar+gzip or tar+zstd (OCI or Docker media type)",
        actual=media_type[:160],
    )
