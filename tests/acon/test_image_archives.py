"""Archives that hold images: what is understood, and what hostile ones are refused for."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from acon_helpers import tar_of

from acon.arguments import RegistryAccess
from acon.errors import UsageError
from acon.images.archive import read_archive
from acon.images.documents import MAX_DOCUMENT_BYTES
from acon.images.image import OciImage, open_image
from acon.images.reference import parse_reference
from acon.layer_bytes import hash_layer
from supervisor.formats.errors import DigestMismatch, FormatError, Refusal
from supervisor.seams import FileBlob

TARS = (tar_of({"bin/sh": b"#!"}), tar_of({"app": b"program"}))
Entry = tuple[str, bytes | tarfile.TarInfo]


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Entry:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


class ArchiveMaker:
    """Writes archives of an image as `docker save` does, and wrong in one thing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = json.dumps(
            {
                "architecture": "amd64",
                "os": "linux",
                "config": {"Entrypoint": ["/app"]},
                "rootfs": {"type": "layers", "diff_ids": [self.diff_id(tar) for tar in TARS]},
            }
        ).encode()
        self.config_name = f"{hashlib.sha256(self.config).hexdigest()}.json"
        self.layers = ["0/layer.tar", "1/layer.tar"]
        self.tags: list[str] | None = ["app:1"]
        self.others: list[dict[str, object]] = []

    @staticmethod
    def diff_id(tar: bytes) -> str:
        return f"sha256:{hashlib.sha256(tar).hexdigest()}"

    def entry(self) -> dict[str, object]:
        return {"Config": self.config_name, "RepoTags": self.tags, "Layers": self.layers}

    def write(self, *entries: Entry, manifest: bytes | None = None) -> str:
        """The archive of these and of manifest and configuration; returns its reference."""
        listed = json.dumps([self.entry(), *self.others]).encode()
        every = [(self.config_name, self.config), *entries, ("manifest.json", manifest or listed)]
        with tarfile.open(self.path, "w") as archive:
            for name, content in every:
                if isinstance(content, tarfile.TarInfo):
                    archive.addfile(content)
                    continue
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return f"docker-archive:{self.path}"

    def whole(self) -> tuple[Entry, ...]:
        return tuple(zip(self.layers, TARS, strict=True))


@pytest.fixture
def maker(tmp_path: Path) -> ArchiveMaker:
    return ArchiveMaker(tmp_path / "image.tar")


async def opened(source: str) -> OciImage:
    return await open_image(parse_reference(source), platform_name=None, access=RegistryAccess())


async def refused(source: str) -> Refusal:
    with pytest.raises(Refusal) as caught:
        await opened(source)
    return caught.value


def check(image: OciImage) -> None:
    assert image.process.entrypoint == ("/app",)
    for layer, tar in zip(image.layers, TARS, strict=True):
        assert isinstance(layer.source, FileBlob)
        digests = hash_layer(layer.source, algorithms=("sha256",))
        assert f"sha256:{digests.hex_digests['sha256']}" == layer.diff_id
        assert digests.size_bytes == len(tar)


async def test_the_legacy_form_with_links_between_layers_is_read(maker: ArchiveMaker) -> None:
    """As older Docker and today's skopeo write it."""
    maker.layers = ["one.tar", "two/layer.tar"]
    entries = (
        ("one.tar", TARS[0]),
        ("content/second.tar", TARS[1]),
        link("two/layer.tar", "../three/../content/again.tar"),
        link("content/again.tar", "content/second.tar", tarfile.LNKTYPE),
    )
    check(await opened(maker.write(*entries)))


async def test_compressed_layers_are_known_by_their_first_bytes(maker: ArchiveMaker) -> None:
    entries = (("0/layer.tar", gzip.compress(TARS[0])), ("1/layer.tar", TARS[1]))
    image = await opened(maker.write(*entries))
    check(image)
    assert [layer.source.media_type.rpartition(".")[2] for layer in image.layers] == [
        "tar+gzip",
        "tar",
    ]


async def test_a_layer_that_is_used_twice_lies_there_once(maker: ArchiveMaker) -> None:
    config = json.loads(maker.config)
    config["rootfs"]["diff_ids"] = [maker.diff_id(TARS[0])] * 2
    maker.config, maker.config_name = json.dumps(config).encode(), "config.json"
    maker.layers = ["0/layer.tar", "0/layer.tar"]
    image = await opened(maker.write(("0/layer.tar", TARS[0])))
    assert image.layers[0] == image.layers[1]


async def test_one_of_several_images_is_named_as_in_a_registry(maker: ArchiveMaker) -> None:
    maker.others = [{**maker.entry(), "RepoTags": ["example.org/other:2"], "Layers": []}]
    source = maker.write(*maker.whole())
    check(await opened(f"{source}:app:1"))
    check(await opened(f"{source}:docker.io/library/app:1"))
    assert (await refused(source)).actual == "images app:1, example.org/other:2"
    assert (await refused(f"{source}:app:2")).rule == "must hold one image app:2"


async def test_an_archive_of_another_kind_is_refused_by_its_kind(
    maker: ArchiveMaker, tmp_path: Path
) -> None:
    for name, kind in (("index.json", "an oci-archive"), ("repositories", "before 1.10")):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(tar_of({name: b"{}"}))
        assert kind in str((await refused(f"docker-archive:{path}")).actual)


@pytest.mark.parametrize("transport", ["docker-archive", "oci-archive"])
async def test_a_compressed_archive_is_refused_with_what_to_do(
    transport: str, tmp_path: Path
) -> None:
    path = tmp_path / "image.tar.gz"
    path.write_bytes(gzip.compress(TARS[0]))
    error = await refused(f"{transport}:{path}")
    assert "`gunzip` it first" in error.rule


@pytest.mark.parametrize("content", [b"", b"no tar at all", bytes(range(256)) * 8])
async def test_a_file_that_is_no_tar_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "image.tar"
    path.write_bytes(content)
    error = await refused(f"docker-archive:{path}")
    assert isinstance(error, UsageError | FormatError)
    assert str(path) in error.item


# --- hostile ones -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../outside", "a/../../outside", "..", "blobs/../../x"]
)
async def test_a_name_outside_the_archive_is_refused(name: str, maker: ArchiveMaker) -> None:
    error = await refused(maker.write(*maker.whole(), (name, b"x")))
    assert error.rule == "a name must lie inside the archive"
    assert name in error.item


async def test_a_name_that_is_there_twice_is_refused(maker: ArchiveMaker) -> None:
    for twice in ("0/layer.tar", "./0/layer.tar", "x/../0/layer.tar"):
        error = await refused(maker.write(*maker.whole(), (twice, b"other")))
        assert error.rule == "an archive of images holds each name once"
        assert "layer.tar" in error.item


@pytest.mark.parametrize(
    "links",
    [
        (link("0/layer.tar", "layer.tar"),),
        (link("0/layer.tar", "../a"), link("a", "b"), link("b", "0/layer.tar")),
        (link("0/layer.tar", "../a", tarfile.LNKTYPE), link("a", "a")),
        (link("0/layer.tar", "0"), *(link(f"0/{n}", str(n + 1)) for n in range(20))),
    ],
    ids=["itself", "a circle", "outside", "a long chain"],
)
async def test_links_that_lead_to_no_file_are_refused(
    links: tuple[Entry, ...], maker: ArchiveMaker
) -> None:
    error = await refused(maker.write(*links, ("1/layer.tar", TARS[1])))
    assert isinstance(error, FormatError)
    assert error.rule in ("a link must lead to a file", "a name must lie inside the archive")


@pytest.mark.parametrize("target", ["/etc/passwd", "../../etc/passwd", "../.."])
async def test_a_link_out_of_the_archive_is_refused(target: str, maker: ArchiveMaker) -> None:
    error = await refused(maker.write(link("0/layer.tar", target), ("1/layer.tar", TARS[1])))
    assert error.rule == "a name must lie inside the archive"


async def test_a_link_to_what_is_not_there_is_refused_with_both_names(
    maker: ArchiveMaker,
) -> None:
    error = await refused(maker.write(link("0/layer.tar", "gone"), ("1/layer.tar", TARS[1])))
    assert "0/gone, which 0/layer.tar links to" in error.rule


async def test_a_member_that_goes_beyond_the_end_is_refused(maker: ArchiveMaker) -> None:
    source = maker.write(*maker.whole())
    whole = maker.path.read_bytes()
    end = whole.index(b"manifest.json") + 512
    maker.path.write_bytes(whole[:end])
    error = await refused(source)
    assert isinstance(error, FormatError)
    assert "manifest.json" in error.item


@pytest.mark.parametrize("size_bytes", [b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12])
async def test_a_member_that_lies_about_its_size_is_refused(
    size_bytes: bytes, maker: ArchiveMaker
) -> None:
    source = maker.write(*maker.whole())
    raw = bytearray(maker.path.read_bytes())
    at = raw.index(b"0/layer.tar")
    raw[at + 124 : at + 136] = size_bytes
    raw[at + 148 : at + 156] = b" " * 8
    raw[at + 148 : at + 156] = b"%06o\0 " % sum(raw[at : at + 512])
    maker.path.write_bytes(raw)
    error = await refused(source)
    assert isinstance(error, FormatError)
    assert "layer.tar" in error.item


async def test_devices_and_pipes_are_refused(maker: ArchiveMaker) -> None:
    for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        error = await refused(maker.write(link("0/layer.tar", "", kind)))
        assert error.rule == "an archive of images holds plain files and links only"


async def test_a_manifest_of_any_size_is_refused_before_it_is_read(
    maker: ArchiveMaker,
) -> None:
    huge = b"[" + b" " * MAX_DOCUMENT_BYTES + b"]"
    error = await refused(maker.write(*maker.whole(), manifest=huge))
    assert error.rule == "the file is too large"
    assert error.item.endswith(": manifest.json")


@pytest.mark.parametrize(
    "manifest",
    [b"{}", b"[" * 100_000, b'[{"Layers": []}]', b'[{"Config": 1}]', b'[{"Config": "/etc/x"}]'],
)
async def test_a_manifest_of_another_form_is_refused(manifest: bytes, maker: ArchiveMaker) -> None:
    error = await refused(maker.write(*maker.whole(), manifest=manifest))
    assert isinstance(error, FormatError | UsageError)
    assert str(maker.path) in error.item


async def test_a_configuration_of_another_digest_than_its_name_is_refused(
    maker: ArchiveMaker,
) -> None:
    maker.config = maker.config.replace(b"/app", b"/bad")
    error = await refused(maker.write(*maker.whole()))
    assert isinstance(error, DigestMismatch)
    assert error.actual == f"sha256:{hashlib.sha256(maker.config).hexdigest()}"


@pytest.mark.parametrize("count", [1, 3])
async def test_as_many_layers_as_diff_ids_must_be_listed(count: int, maker: ArchiveMaker) -> None:
    maker.layers = (maker.layers * 2)[:count]
    entries = (("0/layer.tar", TARS[0]), ("1/layer.tar", TARS[1]))
    error = await refused(maker.write(*entries))
    assert (error.expected, error.actual) == (str(count), "2")


def test_an_archive_of_too_many_members_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("acon.images.archive._MAX_MEMBERS", 3)
    path = tmp_path / "many.tar"
    path.write_bytes(tar_of({str(number): b"" for number in range(4)}))
    with pytest.raises(FormatError, match="bounded number"):
        read_archive(path)


def test_members_are_read_from_where_they_lie_and_no_further(tmp_path: Path) -> None:
    path = tmp_path / "some.tar"
    path.write_bytes(tar_of({"a": b"first", "b": b"second"}))
    files = read_archive(path)
    assert files.read("b", max_bytes=6) == b"second"
    assert files.head("a", 3) == b"fir"
    assert "c" not in files
    with pytest.raises(UsageError, match="there must be a file c"):
        files.locate("c")
    with pytest.raises(UsageError, match="too large"):
        files.read("b", max_bytes=5)
