"""Finds the image that a person means: by id, by the beginning of its digest, by name."""

from __future__ import annotations

from collections.abc import Sequence

from acon.errors import UsageError
from acon.short_ids import MARK, SHOWN_DIGITS, begins
from supervisor.errors import UnknownItem
from supervisor.operations import ImageView

# Shorter beginnings of a digest are more likely a mistake than meant.
_MIN_PREFIX = 4


def find_image(images: Sequence[ImageView], text: str) -> ImageView:
    """Raises `UnknownItem` if none is meant, `UsageError` if several could be."""
    for rule in (_is_id, _is_name, _begins):
        found = [image for image in images if rule(image, text)]
        if len(found) > 1:
            raise UsageError(
                text, "must mean one image", actual=", ".join(image.image_id for image in found)
            )
        if found:
            return found[0]
    known = ", ".join(
        f"{image.image_id} ({', '.join(image.names)})" if image.names else image.image_id
        for image in images
    )
    raise UnknownItem(
        text, "must be an image that was admitted", actual=f"known: {known or 'none'}"
    )


def short(image_id: str, names: Sequence[str] = ()) -> str:
    """For a table: its name, else the beginning of its manifest's digest."""
    return names[0] if names else image_id.rpartition("/")[2][:SHOWN_DIGITS]


def _is_id(image: ImageView, text: str) -> bool:
    return image.image_id == text


def _is_name(image: ImageView, text: str) -> bool:
    # `gateway` means `gateway:1`, whatever its version, as long as there is one of them.
    return image.executable and any(text in (name, name.partition(":")[0]) for name in image.names)


def _begins(image: ImageView, text: str) -> bool:
    beginning = text.removesuffix(MARK)
    if len(beginning.rpartition("/")[2]) < _MIN_PREFIX:
        return False
    if "/" in beginning:
        return begins(image.image_id, text)
    return image.image_id.rpartition("/")[2].startswith(beginning)
