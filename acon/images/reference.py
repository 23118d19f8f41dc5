"""How people name images: `TRANSPORT:PLACE`, as skopeo and podman write them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias, cast, get_args

import msgspec

from acon.errors import UsageError
from plugins.image_store.registry.names import (
    DOCKER_HUB,
    check_repository,
    check_tag,
    parse_blob_digest,
    parse_registry,
)
from supervisor.formats.errors import FormatError

Transport: TypeAlias = Literal["oci", "oci-archive", "docker-archive", "docker", "acon-repo"]
_TRANSPORTS = frozenset(get_args(Transport))

UNDERSTOOD = (
    "oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME:TAG], "
    "docker://HOST/NAME[:TAG|@DIGEST] or acon-repo:DIR[:HASH/SIGNER/MANIFEST]"
)
DEFAULT_TAG = "latest"


class ImageReference(msgspec.Struct, frozen=True, kw_only=True):
    """One image, or a place that holds several.

    `path` is set for all transports but "docker", `registry` and `repository` for that one.
    `tag` is what follows the place: a tag, the NAME:TAG of a docker-archive, the image id of
    an ACON repository; None where the place must hold one image only. At most one of `tag`
    and `digest` (ALGORITHM:HEX, for "docker" alone) is set.
    """

    transport: Transport
    path: Path | None = None
    registry: str | None = None
    repository: str | None = None
    tag: str | None = None
    digest: str | None = None

    def __str__(self) -> str:
        if self.transport == "docker":
            tail = f"@{self.digest}" if self.digest else f":{self.tag}"
            return f"docker://{self.registry}/{self.repository}{tail}"
        return f"{self.transport}:{self.path}" + (f":{self.tag}" if self.tag else "")

    @property
    def place(self) -> Path:
        """The file or folder of a local transport."""
        if self.path is None:
            raise RuntimeError("an image of a registry lies in no file")
        return self.path

    @property
    def remote(self) -> tuple[str, str]:
        """Registry and repository of the transport "docker"."""
        if self.registry is None or self.repository is None:
            raise RuntimeError("an image in a file lies in no registry")
        return self.registry, self.repository


def is_reference(text: str) -> bool:
    """Whether `text` begins as a reference does, and not merely as the name of a file."""
    return text.partition(":")[0] in _TRANSPORTS


def parse_reference(text: str) -> ImageReference:
    """Read what a person typed.

    Names of files may hold colons: the longest beginning that is there is the file. Raises
    `UsageError` that lists what is understood, or says which part is wrong.
    """
    transport, colon, rest = text.partition(":")
    if transport not in _TRANSPORTS or not colon or not rest or "\0" in rest:
        raise UsageError("SOURCE", "must name an image", expected=UNDERSTOOD, actual=text[:160])
    if transport == "docker":
        return _docker(rest, text)
    return _local(cast(Transport, transport), rest)


def parse_name(name: str, *, item: str) -> tuple[str, str, str | None, str | None]:
    """Registry, repository, tag and digest of `[HOST/]NAME[:TAG][@DIGEST]`.

    As everywhere in Docker's world a name without a host is one of docker.io, and there a
    name of one part one of `library`. Neither tag nor digest means the tag `latest`. Raises
    `UsageError`.
    """
    rest, at, digest = name.partition("@")
    # A colon before the last slash belongs to the host's port.
    head, slash, last = rest.rpartition("/")
    last, colon, tag = last.partition(":")
    host, _, repository = f"{head}{slash}{last}".partition("/")
    if not repository or not _looks_like_host(host):
        host, repository = DOCKER_HUB, f"{head}{slash}{last}"
    try:
        registry = parse_registry(host, item=item)
        if registry == DOCKER_HUB and "/" not in repository:
            repository = f"library/{repository}"
        check_repository(repository, item=item)
        if colon:
            check_tag(tag, item=item)
        if at:
            parse_blob_digest(digest, item=item)
    except FormatError as error:
        raise UsageError(
            error.item, error.rule, expected=error.expected, actual=error.actual
        ) from None
    if not colon and not at:
        tag = DEFAULT_TAG
    return registry, repository, tag or None, digest or None


def _looks_like_host(text: str) -> bool:
    return text == "localhost" or any(c in ".:[" or c.isupper() for c in text)


def _docker(rest: str, text: str) -> ImageReference:
    if not rest.startswith("//"):
        raise UsageError("SOURCE", "a registry is named docker://HOST/NAME", actual=text[:160])
    registry, repository, tag, digest = parse_name(rest[2:], item="SOURCE")
    if tag and digest:
        raise UsageError(
            "SOURCE", "an image is named by its tag or by its digest, not by both", actual=text
        )
    return ImageReference(
        transport="docker", registry=registry, repository=repository, tag=tag, digest=digest
    )


def _local(transport: Transport, rest: str) -> ImageReference:
    ends = [len(rest), *(at for at in range(len(rest) - 1, 0, -1) if rest[at] == ":")]
    for end in ends:
        path = Path(rest[:end])
        if path.exists():
            if end == len(rest) - 1:
                raise UsageError("SOURCE", "a name must follow the colon", actual=rest)
            return ImageReference(transport=transport, path=path, tag=rest[end + 1 :] or None)
    what = "folder" if transport in ("oci", "acon-repo") else "file"
    raise UsageError("SOURCE", f"there must be such a {what}", actual=rest)
