"""A container as `--json` shows it: what the daemon says, and the names and signer of its image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from acon.container_client import ListedContainer
from supervisor.operations import ImageView

if TYPE_CHECKING:
    from acon.client import Client


def signer_of(image_id: str) -> str:
    """HASH/SIGNER of HASH/SIGNER/MANIFEST."""
    return image_id.rpartition("/")[0]


def facts_of(container: ListedContainer, names: Sequence[str]) -> dict[str, object]:
    """Whole values, for programs."""
    facts: dict[str, object] = msgspec.to_builtins(container)
    return facts | {"image_names": list(names), "signer": signer_of(container.image_id)}


async def names_of_images(client: Client) -> dict[str, tuple[str, ...]]:
    """What each admitted image calls itself, by its id."""
    images: tuple[ImageView, ...] = await client.images()
    return {image.image_id: image.names for image in images}
