"""What every source of images can be asked, whatever it is."""

from __future__ import annotations

from typing import Protocol

from acon.images.documents import Descriptor
from supervisor.seams import LayerSource


class ImageRepository(Protocol):
    """A place with image manifests and blobs, open for reading.

    All methods raise `Refusal` subclasses or `OSError`; async ones may be cancelled at every
    checkpoint and leave nothing behind.
    """

    @property
    def name(self) -> str:
        """How a person knows the place; for sentences."""

    async def resolve(self, tag: str | None, digest: str | None) -> Descriptor:
        """The manifest or index that one of the two names; neither: the only one there is.

        Raises `UsageError` or `UnknownItem` when there is none such, or several.
        """

    async def document(self, descriptor: Descriptor, *, max_bytes: int) -> bytes:
        """A manifest, index or configuration, at most `max_bytes`.

        Size and digest were compared: raises `DigestMismatch` or `FormatError`.
        """

    async def referrers(
        self, digest: str, artifact_type: str | None = None
    ) -> tuple[Descriptor, ...]:
        """Manifests whose subject is `digest`, of one artifact type if one is given.

        Their `artifact_type` and `annotations` are those of the manifests, which are trusted
        for nothing. A manifest that may be one of them is among them with no `artifact_type`:
        whoever reads it sees what it is, or why it cannot be read.
        """

    def layer_source(self, descriptor: Descriptor) -> LayerSource:
        """Where the bytes of a layer lie; a file's path is absolute. Reads nothing."""
