"""In which groups images are admitted: what `acon load` does and `acon plan` foretells."""

from __future__ import annotations

from collections.abc import Sequence

from supervisor.formats.launch_policy import admissible_groups, require_admissible
from supervisor.formats.signature import SignedManifest

Groups = tuple[tuple[SignedManifest, ...], ...]


def groups_of(
    loaded: Sequence[SignedManifest], wanted: Sequence[SignedManifest], *, together: bool
) -> Groups:
    """Groups in order, without what is loaded already; `together` makes it one group.

    Raises `PolicyDenied` when the images do not accept each other.
    """
    if not together:
        return admissible_groups(loaded, wanted)
    present = {image.image_id for image in loaded}
    new = {image.image_id: image for image in wanted if image.image_id not in present}
    require_admissible([*loaded, *new.values()])
    return (tuple(new.values()),) if new else ()
