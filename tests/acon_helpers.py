"""Small things that the tests of `acon` share by name; fixtures are in conftest."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


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
