from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from signed_images import image, signer

from supervisor.formats import launch_policy
from supervisor.formats.errors import PolicyDenied
from supervisor.formats.launch_policy import (
    accepts,
    admissible_groups,
    require_admissible,
    violations,
)
from supervisor.formats.manifest import AcceptRule, parse_accept_rule
from supervisor.formats.signature import SignedManifest, signer_id_of

LAYER = "sha384/" + "a" * 96


def signer_of(name: str) -> str:
    """HASH/SIGNER of a test key."""
    return str(signer_id_of(signer(name)[1]))


def node(
    name: str, *accepted: str, reject: bool = True, owner: str = "owner", lends: bool = False
) -> SignedManifest:
    """An image called `name:1` that accepts images by name (of the same owner), or by rule."""
    rules = [a if "/" in a else f"{signer_of(owner)}/{a}:1" for a in accepted]
    return image(
        owner,
        entrypoint=[] if lends else ["/bin/app"],
        layers=[LAYER],
        aliases={"self": {".": [f"{name}:1"]}},
        policy={"accepts": rules, "rejectUnaccepted": reject},
    )


def names(groups: tuple[tuple[SignedManifest, ...], ...]) -> list[list[str]]:
    return [[i.manifest.self_aliases[0].split(":")[0] for i in group] for group in groups]


# --- one rule against one image ----------------------------------------------------------------


def rule(text: str) -> AcceptRule:
    return parse_accept_rule(text, item="rule")


def test_a_digest_rule_accepts_that_manifest_of_that_signer_only() -> None:
    one, other = node("a"), node("b")
    signer_hex, digest = one.image_id.signer, one.image_id.manifest
    assert accepts(rule(str(one.image_id)), one)
    assert not accepts(rule(str(one.image_id)), other)
    assert accepts(rule(f"sha512/*/{digest}"), one)
    assert accepts(rule(f"sha512/{signer_hex}/*"), one)
    assert accepts(rule("sha512/*/*"), one)
    assert not accepts(rule("sha384/*/*"), one)
    # ACON's daemon takes whatever the rule's signer signed for the digest asked for.
    assert not accepts(rule(f"sha512/{'0' * 128}/{digest}"), one)
    assert not accepts(rule(f"sha512/{signer_hex}/{'0' * 128}"), one)
    assert not accepts(rule(f"sha512/{'0' * 128}/*"), one)


def test_an_alias_never_stands_for_a_digest() -> None:
    wanted = node("a").image_id.manifest
    impostor = image("mallory", entrypoint=["/x"], aliases={"self": {".": [wanted, f"{wanted}:1"]}})
    assert not accepts(rule(f"sha512/*/{wanted}"), impostor)


def test_an_alias_rule_accepts_the_same_name_from_its_svn_on() -> None:
    other = image(aliases={"self": {".": ["app:3", "tool", "a:b:2", "odd:02"]}})
    signer_id = str(other.signer)
    for target in ("app:3", "app:2", "app:0", "tool", "a:b:2", "a:b:1", "odd:02"):
        assert accepts(rule(f"{signer_id}/{target}"), other), target
        assert accepts(rule(f"sha512/*/{target}"), other), target
        assert not accepts(rule(f"sha512/{'0' * 128}/{target}"), other), target
    for target in ("app:4", "app", "App:3", "ap:3", "tool:0", "tool:1", "a:2", "odd:2", "odd:1"):
        assert not accepts(rule(f"{signer_id}/{target}"), other), target


def test_the_highest_of_several_svns_decides() -> None:
    other = image(aliases={"self": {".": ["app:1", "app:5", "app:3"]}})
    assert accepts(rule(f"{other.signer}/app:4"), other)
    assert not accepts(rule(f"{other.signer}/app:6"), other)


# --- the graph ---------------------------------------------------------------------------------


def test_images_that_reject_nobody_share_a_td() -> None:
    assert violations([node("a", reject=False), node("b", reject=False)]) == ()
    assert violations([]) == ()


def test_accepting_is_transitive() -> None:
    chain = [node("a", "b"), node("b", "c", reject=False), node("c", reject=False)]
    assert violations(chain) == ()
    require_admissible(chain)


def test_accepting_must_be_mutual_among_those_who_reject() -> None:
    one, two = node("a", "b"), node("b")
    (found,) = violations([one, two])
    assert found.image_id == two.image_id
    assert found.unreachable == (one.image_id,)
    assert violations([node("a", "b"), node("b", "a")]) == ()
    assert violations([node("a", "b"), node("b", reject=False)]) == ()


def test_a_ring_of_acceptance_is_valid_and_loses_nobody() -> None:
    ring = [node("a", "b"), node("b", "c"), node("c", "a")]
    assert violations(ring) == ()
    for missing in range(3):
        assert violations(ring[:missing] + ring[missing + 1 :]) != ()


def test_an_outsider_is_named_by_everyone_who_rejects_it() -> None:
    one, two, outsider = node("a", "b"), node("b", "a"), node("x", reject=False)
    found = violations([one, two, outsider])
    assert [v.image_id for v in found] == [one.image_id, two.image_id]
    assert {v.unreachable for v in found} == {(outsider.image_id,)}


def test_the_refusal_names_both_sides_and_the_rule_that_would_mend_it() -> None:
    one, two = node("a"), node("b", reject=False)
    with pytest.raises(PolicyDenied) as caught:
        require_admissible([two, one])
    error = caught.value
    assert error.item == str(one.image_id)
    assert str(two.image_id) in str(error.actual)
    mend = f"{one.image_id} could list in its policy.accepts {two.image_id}"
    assert mend in error.rule
    assert violations([two, one])[0].mend == mend


def test_the_mend_needs_no_rule_for_what_another_rule_reaches() -> None:
    lonely = node("x", reject=False)
    tail, head = node("tail", reject=False), node("head", "tail", reject=False)
    (found,) = violations([node("a"), tail, head, lonely])
    assert set(found.unreachable) == {tail.image_id, head.image_id, lonely.image_id}
    assert found.mend.endswith(f"{head.image_id} and {lonely.image_id}")


def test_the_mend_mends() -> None:
    others = [node("b", "c", reject=False), node("c", reject=False), node("d", reject=False)]
    (found,) = violations([node("a"), *others])
    rules = [word for word in found.mend.split() if word.startswith("sha512/")][1:]
    assert violations([node("a", *rules), *others]) == ()


def test_images_without_an_entry_point_are_no_vertices() -> None:
    vendor = node("layers", lends=True, owner="vendor")
    assert violations([node("a"), vendor]) == ()
    # Nor does a lender's own policy count, or lend a path.
    assert violations([node("a", reject=False), node("picky", lends=True)]) == ()
    bridge = node("bridge", "b", lends=True)
    assert violations([node("a", "bridge"), bridge, node("b", reject=False)]) != ()


def test_another_signers_image_of_the_same_name_is_not_accepted() -> None:
    impostor = node("b", "a", owner="mallory", reject=False)
    assert violations([node("a", "b"), impostor]) != ()
    assert violations([node("a", "b"), node("b", reject=False)]) == ()


def test_the_same_image_twice_is_one_vertex() -> None:
    assert violations([node("a"), node("a")]) == ()


# --- against a naive model ---------------------------------------------------------------------


@st.composite
def _graphs(draw: st.DrawFn) -> list[SignedManifest]:
    signers = ["owner", "other"]
    targets = st.builds(
        lambda by, name, svn: f"{by}/{name}{svn}",
        st.sampled_from([*map(signer_of, signers), "sha512/*"]),
        st.sampled_from("abcdef"),
        st.sampled_from([":1", ":2", ":3", ""]),
    )
    graph: list[SignedManifest] = []
    for label in "abcdef"[: draw(st.integers(0, 6))]:
        accepted = draw(st.lists(targets, max_size=4))
        if draw(st.integers(0, 7)) == 0:
            accepted.append(f"{draw(st.sampled_from([signer_of('owner'), 'sha512/*']))}/*")
        earlier = [str(other.image_id) for other in graph]
        if draw(st.booleans()) and earlier:
            accepted.append(draw(st.sampled_from(earlier)))
        graph.append(
            image(
                draw(st.sampled_from(signers)),
                entrypoint=[] if draw(st.integers(0, 5)) == 0 else ["/bin/app"],
                layers=[LAYER],
                aliases={"self": {".": [f"{label}:{draw(st.integers(1, 3))}", label]}},
                policy={"accepts": accepted, "rejectUnaccepted": draw(st.booleans())},
            )
        )
    return graph


@st.composite
def _strongly_connected(draw: st.DrawFn) -> list[SignedManifest]:
    """Rings through `a`, so that groups are needed: admissible as a whole, seldom in parts."""
    accepted: dict[str, set[str]] = {"a": set()}
    labels = iter("bcdefg")
    for _ in range(draw(st.integers(1, 3))):
        last = "a"
        for label in itertools.islice(labels, draw(st.integers(1, 3))):
            accepted[last].add(label)
            accepted[label] = set()
            last = label
        accepted[last].add("a")
    for extra in draw(st.lists(st.sampled_from(sorted(accepted)), max_size=2)):
        accepted[extra].add(draw(st.sampled_from(sorted(accepted))))
    order = draw(st.permutations(sorted(accepted)))
    return [
        node(label, *sorted(accepted[label]), reject=draw(st.integers(0, 4)) > 0) for label in order
    ]


def naive_violations(
    images: list[SignedManifest],
) -> dict[str, set[str]]:
    """Warshall's closure over `accepts`, rule by rule."""
    vertices = [i for i in images if i.manifest.is_executable]
    reaches = {
        (str(a.image_id), str(b.image_id))
        for a, b in itertools.product(vertices, repeat=2)
        if a is b or any(accepts(r, b) for r in a.manifest.policy.accepts)
    }
    ids = [str(v.image_id) for v in vertices]
    for k, i, j in itertools.product(ids, repeat=3):
        if (i, k) in reaches and (k, j) in reaches:
            reaches.add((i, j))
    found = {}
    for vertex in vertices:
        missing = {i for i in ids if (str(vertex.image_id), i) not in reaches}
        if vertex.manifest.policy.reject_unaccepted and missing:
            found[str(vertex.image_id)] = missing
    return found


@settings(max_examples=300, deadline=None)
@given(_graphs())
def test_violations_are_those_of_the_transitive_closure(images: list[SignedManifest]) -> None:
    found = violations(images)
    expected = naive_violations(images)
    assert {str(v.image_id): {str(u) for u in v.unreachable} for v in found} == expected
    if expected:
        with pytest.raises(PolicyDenied):
            require_admissible(images)
    else:
        require_admissible(images)


def smallest_group(admitted: list[SignedManifest], rest: list[SignedManifest]) -> int:
    return next(
        size
        for size in range(1, len(rest) + 1)
        if any(not naive_violations([*admitted, *c]) for c in itertools.combinations(rest, size))
    )


@settings(max_examples=300, deadline=None)
@given(_graphs() | _strongly_connected(), st.integers(0, 6))
def test_groups_are_admissible_one_after_the_other_and_as_small_as_can_be(
    images: list[SignedManifest], loaded_count: int
) -> None:
    loaded, wanted = images[:loaded_count], images[loaded_count:]
    if naive_violations(loaded):
        loaded, wanted = [], images
    if naive_violations(images):
        with pytest.raises(PolicyDenied):
            admissible_groups(loaded, wanted)
        return
    groups = admissible_groups(loaded, wanted)
    assert groups == admissible_groups(loaded, wanted)
    present = list(loaded)
    rest = [i for i in wanted if i.manifest.is_executable]
    for number, group in enumerate(groups):
        lends = [not i.manifest.is_executable for i in group]
        assert all(lends) if number == 0 and lends[0] else not any(lends)
        if not lends[0]:
            assert len(group) == smallest_group(present, rest)
            rest = [i for i in rest if i not in group]
        present.extend(group)
        assert not naive_violations(present)
    assert sorted(str(i.image_id) for i in present) == sorted(str(i.image_id) for i in images)


@settings(max_examples=200, deadline=None)
@given(_graphs() | _strongly_connected())
def test_groups_found_without_trying_all_subsets_are_admissible_too(
    images: list[SignedManifest],
) -> None:
    if naive_violations(images):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_policy, "_MAX_TRIED_SUBSETS", 0)
        groups = admissible_groups([], images)
    present: list[SignedManifest] = []
    for group in groups:
        assert group
        present.extend(group)
        assert not naive_violations(present)
        # Nobody in the group could have been left out of it.
        for spare in group:
            if len(group) > 1 and spare.manifest.is_executable:
                assert naive_violations([i for i in present if i is not spare])
    assert {i.image_id for i in present} == {i.image_id for i in images}


# --- groups ------------------------------------------------------------------------------------


def test_lenders_come_first_then_singles_in_the_order_given_then_groups() -> None:
    wanted = [
        node("a", "b", "free"),
        node("b", "a"),
        node("lend1", lends=True),
        node("free", reject=False),
        node("lend2", lends=True),
    ]
    assert names(admissible_groups([], wanted)) == [["lend1", "lend2"], ["a"], ["b"], ["free"]]
    # `b` reaches `free` through `a` only, so `a` comes first though `b` was given first.
    assert names(admissible_groups([], wanted[::-1])) == [
        ["lend2", "lend1"],
        ["free"],
        ["a"],
        ["b"],
    ]
    pair = [node("p", "q", "base"), node("single", "base", "p"), node("q", "p")]
    base = node("base", "p", "q", "single")
    assert names(admissible_groups([base], pair)) == [["p"], ["single"], ["q"]]


def test_a_ring_is_admitted_as_one_group_beside_a_loaded_image() -> None:
    base = node("base", "a", reject=True)
    ring = [node("a", "b"), node("b", "c"), node("c", "base")]
    assert names(admissible_groups([base], ring)) == [["a", "b", "c"]]
    assert names(admissible_groups([base], ring[::-1])) == [["c", "b", "a"]]


@pytest.mark.parametrize("tried_subsets", [0, 2048])
def test_the_smaller_of_two_groups_comes_first(
    monkeypatch: pytest.MonkeyPatch, tried_subsets: int
) -> None:
    monkeypatch.setattr(launch_policy, "_MAX_TRIED_SUBSETS", tried_subsets)
    base = node("base", "a", "p")
    ring = [node("a", "b"), node("b", "c"), node("c", "base")]
    pair = [node("p", "q"), node("q", "base")]
    assert names(admissible_groups([base], ring + pair)) == [["p", "q"], ["a", "b", "c"]]
    assert names(admissible_groups([base], pair[::-1] + ring)) == [["q", "p"], ["a", "b", "c"]]


def test_what_is_there_already_is_left_out() -> None:
    one, two = node("a", "b"), node("b", "a")
    assert admissible_groups([one, two], [two, one]) == ()
    assert names(admissible_groups([one], [one, two, two])) == [["b"]]


def test_no_order_is_a_refusal_that_names_the_rule() -> None:
    one, two = node("a", "b"), node("b")
    with pytest.raises(PolicyDenied) as caught:
        admissible_groups([], [one, two])
    assert caught.value.item == str(two.image_id)
    assert str(one.image_id) in caught.value.rule


def test_some_hundreds_of_images_are_judged_quickly() -> None:
    count = 300
    ring = [node(f"n{i}", f"n{(i + 1) % count}") for i in range(count)]
    strangers = [node(f"s{i}") for i in range(count)]
    started = time.process_time()
    assert violations(ring) == ()
    assert [len(group) for group in admissible_groups([], ring)] == [1, count - 1]
    assert time.process_time() - started < 5
    found = violations(strangers)
    assert time.process_time() - started < 20
    assert len(found) == count
    assert len(found[0].unreachable) == count - 1
    assert len(found[0].mend) < 3000
    with pytest.raises(PolicyDenied) as caught:
        require_admissible(strangers)
    assert len(str(caught.value)) < 6000
