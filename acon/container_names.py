"""Finds the container that a person means: by its number, or by its image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from acon.errors import UsageError
from acon.image_names import find_image
from supervisor.errors import UnknownItem
from supervisor.operations import ContainerView

if TYPE_CHECKING:
    from acon.client import Client


async def container_id_of(client: Client, text: str) -> int:
    """Raises `UnknownItem` or, if several could be meant, `UsageError`.

    A number is taken as it is: whether there is such a container, the daemon will say.
    """
    if text.isdecimal():
        return int(text)
    image = find_image(await client.images(), text)
    meant = [one for one in await client.containers() if one.image_id == image.image_id]
    return _only(meant, text).container_id


def _only(containers: Sequence[ContainerView], text: str) -> ContainerView:
    alive = [one for one in containers if one.state != "exited"]
    candidates = alive or containers
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise UnknownItem(text, "no container of this image is known")
    numbers = ", ".join(str(one.container_id) for one in candidates)
    raise UsageError(text, "must mean one container", actual=f"containers {numbers}")
