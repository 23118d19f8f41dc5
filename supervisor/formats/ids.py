"""Who signed an image, and which image it is (ACON image spec 1.0, "Cryptographic Algorithm
Selection"). One hash algorithm, the signing certificate's, names both parts of an id."""

from __future__ import annotations

import msgspec

from supervisor.formats.digest import check_algorithm, check_hex
from supervisor.formats.errors import FormatError

# How much of a stranger's text an error repeats.
SHOWN_CHARACTERS = 160


class SignerId(msgspec.Struct, frozen=True, order=True):
    """`HASH/SIGNER`; `hex` is the lower-case digest of the signing certificate's DER."""

    algorithm: str
    hex: str

    def __str__(self) -> str:
        return f"{self.algorithm}/{self.hex}"


class ImageId(msgspec.Struct, frozen=True, order=True):
    """`HASH/SIGNER/MANIFEST`; both digests are lower-case hex under `algorithm`.

    `signer` is over the certificate's DER, `manifest` over the manifest's bytes as signed.
    """

    algorithm: str
    signer: str
    manifest: str

    def __str__(self) -> str:
        return f"{self.algorithm}/{self.signer}/{self.manifest}"

    @property
    def signer_id(self) -> SignerId:
        return SignerId(self.algorithm, self.signer)


def parse_signer_id(
    text: str, *, item: str = "signer id", unsafe_allow_sha256: bool = False
) -> SignerId:
    """Parse `HASH/SIGNER`. Raises `FormatError` naming `item`."""
    parts = text.split("/", 2)
    if len(parts) != 2:
        raise FormatError(
            item, "a signer id is written HASH/SIGNER", actual=text[:SHOWN_CHARACTERS]
        )
    algorithm, signer = parts
    check_algorithm(
        algorithm[:SHOWN_CHARACTERS], item=item, unsafe_allow_sha256=unsafe_allow_sha256
    )
    check_hex(algorithm, signer, item=item)
    return SignerId(algorithm, signer)


def parse_image_id(
    text: str, *, item: str = "image id", unsafe_allow_sha256: bool = False
) -> ImageId:
    """Parse `HASH/SIGNER/MANIFEST`. Raises `FormatError` naming `item`."""
    parts = text.split("/", 3)
    if len(parts) != 3:
        raise FormatError(
            item, "an image id is written HASH/SIGNER/MANIFEST", actual=text[:SHOWN_CHARACTERS]
        )
    algorithm, signer, manifest = parts
    check_algorithm(
        algorithm[:SHOWN_CHARACTERS], item=item, unsafe_allow_sha256=unsafe_allow_sha256
    )
    check_hex(algorithm, signer, item=item)
    check_hex(algorithm, manifest, item=item)
    return ImageId(algorithm, signer, manifest)
