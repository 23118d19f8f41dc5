"""Admissions one after the other are judged as the images until then are."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from signed_images import image

from supervisor.formats.launch_policy import violations, violations_after_each

_NAMES = ("a", "b", "c", "d")


@given(
    st.lists(st.tuples(st.sets(st.sampled_from(_NAMES)), st.booleans()), min_size=4, max_size=4),
    st.lists(st.integers(0, 3), max_size=6),
)
def test_each_groups_violations_are_those_of_all_images_until_then(
    policies: list[tuple[set[str], bool]], order: list[int]
) -> None:
    images = [
        image(
            aliases={"self": {".": [f"{name}:1"]}},
            entrypoint=[f"/{name}"],
            policy={
                "accepts": [f"sha512/*/{other}:1" for other in sorted(accepted)],
                "rejectUnaccepted": reject,
            },
        )
        for name, (accepted, reject) in zip(_NAMES, policies, strict=True)
    ]
    groups = [[images[at]] for at in order]
    found = list(violations_after_each(groups))
    assert found == [
        violations([images[at] for at in order[: end + 1]]) for end in range(len(order))
    ]
