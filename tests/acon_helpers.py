"""Small things that the tests of `acon` share by name; fixtures are in conftest."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from acon.keys import load_private_key
from supervisor.formats import canonical_json
from supervisor.formats.signature import SignedManifest, sign_manifest, verify_signed_manifest


@dataclass(frozen=True)
class Signer:
    """A key and a certificate of its own, in PEM files; the certificate in DER too."""

    key: Path
    certificate: Path
    certificate_der: Path

    @property
    def signer_id(self) -> str:
        return f"sha384/{hashlib.sha384(self.certificate_der.read_bytes()).hexdigest()}"


MakeSigner = Callable[..., Signer]
MakeLayout = Callable[..., Path]
Acon = Callable[..., int]


def tar_of(files: dict[str, bytes]) -> bytes:
    """An uncompressed tar of regular files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


@dataclass
class MemoryBar:
    """An `acon.output.Bar` that remembers; `then` is told where it stands."""

    then: Callable[[int], object] = field(default=lambda _done: None)
    reached: list[int] = field(default_factory=list)

    def advance(self, count_bytes: int) -> None:
        self.reach((self.reached or [0])[-1] + count_bytes, None)

    def reach(self, done_bytes: int, total_bytes: int | None) -> None:
        self.reached.append(done_bytes)
        self.then(done_bytes)

    def end(self) -> None:
        pass


def signed_image(signer: Signer, **fields: object) -> SignedManifest:
    """A verified image of the spec's version with the given fields."""
    raw = canonical_json.encode_go({"aconSpecVersion": [1, 0], **fields})
    certificate = signer.certificate_der.read_bytes()
    return verify_signed_manifest(
        raw, sign_manifest(raw, load_private_key(signer.key), certificate), certificate
    )
