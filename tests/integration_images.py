"""Tiny real images: the machine's static busybox and a shell script, made with `acon` itself."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from acon import cli
from acon.bundle import Bundle
from acon.local_layer import LocalLayer
from supervisor.formats.digest import Digest
from supervisor.operations import ManifestUpload
from supervisor.seams import FileBlob

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples" / "demo"))

import oci

BUSYBOX = Path("/bin/busybox")
# What the scripts use; each is a link to busybox.
APPLETS = ("sh", "sleep", "cat", "id", "find", "dd", "mv", "true", "test")
ENTRYPOINT = ("/bin/sh", "/app/main.sh")
FOLDERS = ("bin", "dev", "proc", "tmp", "run", "shared", "app")

# Runs until it is asked to end, and then ends well.
WAITS = """\
trap 'exit 0' TERM
echo "uid $(id -u)" > /tmp/ready.new; mv /tmp/ready.new /tmp/ready
while :; do sleep 1 & wait $!; done
"""


@dataclass(frozen=True)
class ImageFile:
    """A file in an image's upper layer."""

    content: bytes
    mode: int = 0o755
    uid: int = 0


@dataclass(frozen=True)
class Image:
    """A signed bundle."""

    name: str
    bundle: Bundle

    @property
    def image_id(self) -> str:
        return str(self.bundle.signed().image_id)

    @property
    def folder(self) -> Path:
        return self.bundle.directory


class ImageMaker:
    """Makes and signs images in `folder`. The base layer is packed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._base = oci.pack(_base_tar())
        self._signers: dict[str, tuple[Path, Path]] = {}

    def signer(self, name: str) -> tuple[Path, Path]:
        """(key in PEM, certificate in DER), made at first use: P-384 with SHA-384."""
        if name not in self._signers:
            key, certificate = self.folder / f"{name}.pem", self.folder / f"{name}.der"
            command = ["openssl", "req", "-x509", "-newkey", "ec", "-nodes", "-sha384"]
            command += ["-pkeyopt", "ec_paramgen_curve:P-384", "-days", "30"]
            command += ["-subj", f"/CN={name}", "-keyout", str(key)]
            command += ["-outform", "DER", "-out", str(certificate)]
            subprocess.run(command, check=True, capture_output=True)
            self._signers[name] = key, certificate
        return self._signers[name]

    def layout(
        self,
        name: str,
        script: str,
        *,
        ballast: bytes = b"",
        files: Mapping[str, ImageFile] = MappingProxyType({}),
        entrypoint: tuple[str, ...] = ENTRYPOINT,
        env: tuple[str, ...] = ("PATH=/bin",),
    ) -> str:
        """An OCI layout with one image that runs `script`; returns how `acon` is told of it."""
        directory = self.folder / "layouts" / name
        files = {"app/main.sh": ImageFile(script.encode()), **files}
        if ballast:
            files["app/ballast"] = ImageFile(ballast)
        oci.write_layout(
            directory,
            tag="1",
            layers=[self._base, oci.pack(_tar_of(files))],
            process=oci.Process(entrypoint=entrypoint, env=env),
        )
        return f"oci:{directory}:1"

    def make(
        self,
        name: str,
        script: str = WAITS,
        *,
        signer: str = "owner",
        options: tuple[str, ...] = ("--signal", "15", "--max-instances", "0"),
        ballast: bytes = b"",
        files: Mapping[str, ImageFile] = MappingProxyType({}),
        entrypoint: tuple[str, ...] = ENTRYPOINT,
        env: tuple[str, ...] = ("PATH=/bin",),
        fields: Mapping[str, object] = MappingProxyType({}),
    ) -> Image:
        """A signed image that may share the TD with all others.

        `fields` are the manifest's for which `acon image convert` has no option.
        """
        bundle = self.folder / "bundles" / name
        key, certificate = self.signer(signer)
        source = self.layout(
            name, script, ballast=ballast, files=files, entrypoint=entrypoint, env=env
        )
        convert = ["image", "convert", source, "-o", bundle, "--name", f"{name}:1", *options]
        _run(*convert)
        manifest = bundle / "manifest.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **fields}))
        _run("image", "sign", bundle, "--key", key, "--cert", certificate)
        return Image(name, Bundle(bundle))


def upload_of(image: Image) -> ManifestUpload:
    signed = image.bundle.signed()
    return ManifestUpload(
        manifest=signed.manifest_bytes,
        signature=signed.signature,
        certificate_der=signed.certificate_der,
    )


def layers_of(*images: Image) -> list[LocalLayer]:
    """Every layer of the images, once, ready to be uploaded."""
    found: dict[Digest, LocalLayer] = {}
    for image in images:
        for reference in image.bundle.signed().manifest.layers:
            if isinstance(reference, Digest) and reference not in found:
                source = image.bundle.sources()[str(reference)]
                assert isinstance(source, FileBlob) and source.tar_size_bytes is not None
                found[reference] = LocalLayer(reference, source, source.tar_size_bytes)
    return list(found.values())


def _run(*words: object) -> None:
    with redirect_stdout(io.StringIO()):  # not 100 lines with every failure
        code = cli.main([str(word) for word in words])
    assert code == 0, words


def _base_tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in FOLDERS:
            info = tarfile.TarInfo(name)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(info)
        program = BUSYBOX.read_bytes()
        info = tarfile.TarInfo("bin/busybox")
        info.mode, info.size = 0o755, len(program)
        archive.addfile(info, io.BytesIO(program))
        for applet in APPLETS:
            info = tarfile.TarInfo(f"bin/{applet}")
            info.type, info.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(info)
    return out.getvalue()


def _tar_of(files: Mapping[str, ImageFile]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, file in files.items():
            info = tarfile.TarInfo(name)
            info.mode, info.size, info.uid = file.mode, len(file.content), file.uid
            archive.addfile(info, io.BytesIO(file.content))
    return out.getvalue()
