from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from random import Random
from typing import NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from signed_images import image

from supervisor.formats.delegation import (
    MAX_HOPS,
    AliasStatement,
    DelegationHop,
    ResolvedLayer,
    resolve_layers,
    statements_of,
)
from supervisor.formats.digest import Digest
from supervisor.formats.errors import DelegationUnresolved
from supervisor.formats.ids import ImageId, SignerId
from supervisor.formats.references import DelegatedReference, LayerReference

CSP = SignerId("sha384", "c" * 96)
OTHER = SignerId("sha384", "d" * 96)


def layer(digit: str) -> Digest:
    return Digest("sha384", digit * 96)


def ref(alias: str, signer: SignerId = CSP) -> DelegatedReference:
    return DelegatedReference(signer, alias)


def says(
    target: LayerReference, *aliases: str, by: SignerId = CSP, manifest: str = "0"
) -> list[AliasStatement]:
    """One manifest's statements about one layer; `manifest` is a hex digit of its digest."""
    image_id = ImageId(by.algorithm, by.hex, manifest * 96)
    return [AliasStatement(by, alias, target, image_id, manifest * 96) for alias in aliases]


def resolved(reference: LayerReference, statements: list[AliasStatement]) -> ResolvedLayer:
    (found,) = resolve_layers([reference], statements)
    return found


def unresolved(reference: LayerReference, statements: list[AliasStatement]) -> DelegationUnresolved:
    with pytest.raises(DelegationUnresolved) as caught:
        resolve_layers([reference], statements)
    with pytest.raises(DelegationUnresolved) as again:
        resolve_layers([reference], statements[::-1])
    assert str(again.value) == str(caught.value)
    return caught.value


def test_a_pinned_layer_needs_no_statement() -> None:
    assert resolved(layer("1"), []) == ResolvedLayer(layer("1"), ())


def test_who_delegates_nothing_does_not_pay_for_the_statements_of_others() -> None:
    class Unread(Sequence[AliasStatement]):
        """As many as an evidence file can hold: nobody may walk them for nothing."""

        def __len__(self) -> int:
            return 10_000_000

        def __getitem__(self, index: object) -> NoReturn:
            raise RuntimeError("statements were read")

    pinned = [layer("1"), layer("2")]
    assert [one.digest for one in resolve_layers(pinned, Unread())] == pinned


def test_a_delegated_layer_is_what_its_signer_called_so() -> None:
    statements = says(layer("1"), "python:2", manifest="e")
    assert resolved(ref("python:2"), statements) == ResolvedLayer(
        layer("1"),
        (DelegationHop(f"signer/sha384/{'c' * 96}/python:2", str(CSP), "python:2", 2, "e" * 96),),
    )


def test_layers_keep_their_order() -> None:
    statements = says(layer("1"), "a:1") + says(layer("2"), "b:1")
    layers: list[LayerReference] = [ref("b:1"), layer("3"), ref("a:1"), ref("b:1")]
    assert [r.digest for r in resolve_layers(layers, statements)] == [
        layer("2"),
        layer("3"),
        layer("1"),
        layer("2"),
    ]


def test_another_signers_statement_does_not_count() -> None:
    error = unresolved(ref("python:2"), says(layer("1"), "python:2", by=OTHER))
    assert error.item == str(ref("python:2"))
    stronger = SignerId("sha512", "c" * 128)
    unresolved(ref("python:2"), says(layer("1"), "python:2", by=stronger))


def test_a_newer_version_counts_only_where_it_lists_the_older() -> None:
    error = unresolved(ref("python:2"), says(layer("3"), "python:3", "python"))
    assert error.actual == "only python, python:3"
    found = resolved(ref("python:2"), says(layer("3"), "python:3", "python:2"))
    assert found.digest == layer("3")
    assert (found.delegation[0].alias, found.delegation[0].svn) == ("python:3", 3)


def test_an_older_version_does_not_satisfy_a_newer_reference() -> None:
    error = unresolved(ref("python:2"), says(layer("1"), "python:1", "python:0"))
    assert error.actual == "only python:0, python:1"


def test_the_highest_svn_listed_wins() -> None:
    statements = (
        says(layer("2"), "python:2", manifest="2")
        + says(layer("3"), "python:3", "python:2", manifest="3")
        + says(layer("9"), "python:9", manifest="9")
        + says(layer("4"), "python:10", "python:2", manifest="4")
    )
    found = resolved(ref("python:2"), statements)
    assert found.digest == layer("4")
    assert found.delegation[0].svn == 10
    assert found.delegation[0].statement_digest_sha384 == "4" * 96
    assert resolved(ref("python:3"), statements).digest == layer("3")


def test_svn_0_is_an_svn() -> None:
    statements = says(layer("1"), "python:0", "python")
    (hop,) = resolved(ref("python"), statements).delegation
    assert (hop.alias, hop.svn) == ("python:0", 0)
    assert resolved(ref("python"), statements + says(layer("2"), "python")).digest == layer("1")
    error = unresolved(ref("python:0"), statements + says(layer("2"), "python:0"))
    assert error.expected == "one layer at SVN 0"


def test_svns_of_other_names_do_not_count() -> None:
    statements = says(layer("2"), "python:2", "perl:9") + says(layer("3"), "python:3", "python:2")
    assert resolved(ref("python:2"), statements).digest == layer("3")


def test_two_layers_at_the_highest_svn_are_refused() -> None:
    statements = says(layer("1"), "python:2", manifest="1") + says(
        layer("2"), "python:2", manifest="2"
    )
    error = unresolved(ref("python:2"), statements)
    assert error.expected == "one layer at SVN 2"
    assert error.actual == f"{layer('1')} and {layer('2')}"
    higher = says(layer("3"), "python:3", "python:2", manifest="3")
    assert resolved(ref("python:2"), statements + higher).digest == layer("3")


def test_several_statements_of_one_layer_are_fine() -> None:
    statements = says(layer("1"), "python:2", manifest="9") + says(
        layer("1"), "python:2", manifest="5"
    )
    found = resolved(ref("python:2"), statements)
    assert found.digest == layer("1")
    assert found.delegation[0].statement_digest_sha384 == "5" * 96


def test_the_svn_may_be_listed_in_another_manifest_of_the_signer() -> None:
    statements = (
        says(layer("1"), "python:2", manifest="1")
        + says(layer("1"), "python:5", manifest="2")
        + says(layer("3"), "python:3", "python:2", manifest="3")
    )
    (hop,) = resolved(ref("python:2"), statements).delegation
    assert (hop.alias, hop.svn, hop.statement_digest_sha384) == ("python:5", 5, "1" * 96)
    both = says(layer("1"), "python:5", "python:2", manifest="4")
    (hop,) = resolved(ref("python:2"), statements + both).delegation
    assert hop.statement_digest_sha384 == "4" * 96


def test_an_alias_without_svn_takes_the_highest_svn_of_its_name() -> None:
    plain = says(layer("1"), "python")
    (hop,) = resolved(ref("python"), plain).delegation
    assert (hop.alias, hop.svn) == ("python", None)
    newer = says(layer("2"), "python:1", "python")
    assert resolved(ref("python"), plain + newer).digest == layer("2")
    unresolved(ref("python"), plain + says(layer("2"), "python"))


def test_an_alias_may_point_to_another_alias() -> None:
    statements = says(ref("py:7", OTHER), "python:2", "python:3", manifest="1") + says(
        layer("7"), "py:7", "py:8", by=OTHER, manifest="2"
    )
    found = resolved(ref("python:2"), statements)
    assert found.digest == layer("7")
    assert [(h.reference, h.signer, h.alias, h.svn) for h in found.delegation] == [
        (str(ref("python:2")), str(CSP), "python:3", 3),
        (str(ref("py:7", OTHER)), str(OTHER), "py:8", 8),
    ]
    assert [h.statement_digest_sha384 for h in found.delegation] == ["1" * 96, "2" * 96]


def test_two_ways_to_the_same_layer_are_one_layer() -> None:
    statements = says(layer("7"), "python:2") + says(ref("py:7", OTHER), "python:2")
    direct = says(layer("7"), "py:7", by=OTHER)
    found = resolved(ref("python:2"), statements + direct)
    assert found.digest == layer("7")
    assert len(found.delegation) == 1
    unresolved(ref("python:2"), statements + says(layer("8"), "py:7", by=OTHER))


def test_an_alias_that_leads_nowhere_is_refused_though_an_older_one_would_do() -> None:
    statements = says(layer("1"), "python:2") + says(ref("py:7", OTHER), "python:3", "python:2")
    error = unresolved(ref("python:2"), statements)
    assert error.item == str(ref("py:7", OTHER))
    assert str(ref("python:2")) in error.rule


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_cycle_is_refused(length: int) -> None:
    statements = [s for n in range(length) for s in says(ref(f"a{(n + 1) % length}:1"), f"a{n}:1")]
    error = unresolved(ref("a0:1"), statements)
    assert "cycle" in error.rule
    assert error.actual == " -> ".join(str(ref(f"a{n % length}:1")) for n in range(length + 1))


def test_a_chain_of_aliases_is_bounded() -> None:
    def chain(hops: int) -> list[AliasStatement]:
        links = [s for n in range(hops - 1) for s in says(ref(f"a{n + 1}:1"), f"a{n}:1")]
        return links + says(layer("1"), f"a{hops - 1}:1")

    found = resolved(ref("a0:1"), chain(MAX_HOPS))
    assert (found.digest, len(found.delegation)) == (layer("1"), MAX_HOPS)
    for hops in (MAX_HOPS + 1, 5000):
        error = unresolved(ref("a0:1"), chain(hops))
        assert error.expected == "8 hops at most"
    # What was resolved before makes no difference.
    long = chain(MAX_HOPS + 1)
    with pytest.raises(DelegationUnresolved):
        resolve_layers([ref("a1:1"), ref("a5:1"), ref("a0:1")], long)
    assert resolve_layers([ref("a5:1"), ref("a1:1")], long)[1].digest == layer("1")


def test_the_longest_of_the_ways_that_must_agree_counts() -> None:
    """Else whether a reference resolves would depend on what was resolved before it."""
    links = [s for n in range(1, 7) for s in says(ref(f"a{n + 1}:1"), f"a{n}:1")]
    statements = links + says(layer("1"), "a7:1", "a1:1") + says(ref("a1:1"), "b:1")
    statements += says(ref("b:1"), "c:1")
    assert len(resolved(ref("b:1"), statements).delegation) == 2
    unresolved(ref("c:1"), statements)
    with pytest.raises(DelegationUnresolved):
        resolve_layers([ref("a1:1"), ref("b:1"), ref("c:1")], statements)


def test_many_ways_are_not_walked_one_by_one() -> None:
    width = 30
    statements = []
    for depth in range(MAX_HOPS - 1):
        for source in range(width):
            for target in range(width):
                statements += says(ref(f"d{depth + 1}n{target}:1"), f"d{depth}n{source}:1")
    for source in range(width):
        statements += says(layer("1"), f"d{MAX_HOPS - 1}n{source}:1")
    started = time.process_time()
    assert resolved(ref("d0n0:1"), statements).digest == layer("1")
    assert time.process_time() - started < 5


def test_statements_are_read_from_a_verified_manifest() -> None:
    one, two = str(layer("1")), str(ref("py:7", OTHER))
    signed = image("vendor", aliases={"contents": {one: ["python:3", "python:2"], two: ["perl:1"]}})
    digest = hashlib.sha384(signed.manifest_bytes).hexdigest()
    assert [(str(s.target), s.alias) for s in statements_of(signed)] == [
        (one, "python:3"),
        (one, "python:2"),
        (two, "perl:1"),
    ]
    for statement in statements_of(signed):
        assert statement.signer == signed.signer
        assert statement.image_id == signed.image_id
        assert statement.digest_sha384 == digest
    found = resolved(DelegatedReference(signed.signer, "python:2"), list(statements_of(signed)))
    assert found.digest == layer("1")
    assert statements_of(image()) == ()


# --- properties --------------------------------------------------------------------------------

_aliases = st.sampled_from(["a:1", "a:2", "a:3", "b:1", "b:2", "a", "c"])
_signers = st.sampled_from([CSP, OTHER])
_references = st.builds(DelegatedReference, _signers, _aliases)
_targets: st.SearchStrategy[LayerReference] = st.one_of(
    st.sampled_from("12").map(layer), _references
)
_statements = st.lists(
    st.builds(
        lambda by, target, aliases, manifest: says(target, *aliases, by=by, manifest=manifest),
        _signers,
        _targets,
        st.lists(_aliases, min_size=1, max_size=3),
        st.sampled_from("0123"),
    ),
    max_size=6,
).map(lambda groups: [s for group in groups for s in group])


def outcome(layers: list[LayerReference], statements: list[AliasStatement]) -> object:
    try:
        return resolve_layers(layers, statements)
    except DelegationUnresolved as error:
        return error.to_dict()


@settings(max_examples=500)
@given(_statements, st.lists(_references, min_size=1, max_size=3), st.randoms())
def test_the_order_and_repetition_of_statements_make_no_difference(
    statements: list[AliasStatement], layers: list[LayerReference], random: Random
) -> None:
    shuffled = statements + statements[:2]
    random.shuffle(shuffled)
    assert outcome(layers, shuffled) == outcome(layers, statements)


@settings(max_examples=500)
@given(_statements, _references, _references)
def test_what_was_resolved_before_makes_no_difference(
    statements: list[AliasStatement], first: DelegatedReference, second: DelegatedReference
) -> None:
    alone = outcome([second], statements)
    both = outcome([first, second], statements)
    if isinstance(both, tuple) and isinstance(alone, tuple):
        assert both[1:] == alone
    elif isinstance(both, tuple):
        pytest.fail("resolved only because another was resolved before")


def naive(
    reference: LayerReference, statements: list[AliasStatement], hops: int
) -> set[Digest] | None:
    """All layers that a reference may mean, straight from the definition; None: unresolvable."""
    if isinstance(reference, Digest):
        return {reference}
    if hops == 0:
        return None

    def svn(target: LayerReference) -> int:
        name = reference.alias.split(":")[0]
        listed = [s.alias for s in statements if (s.signer, s.target) == (reference.signer, target)]
        return max([int(a[len(name) + 1 :]) for a in listed if a.startswith(name + ":")] + [-1])

    targets = {
        s.target for s in statements if (s.signer, s.alias) == (reference.signer, reference.alias)
    }
    if not targets:
        return None
    best = max(svn(target) for target in targets)
    means: set[Digest] = set()
    for target in targets:
        if svn(target) == best:
            found = naive(target, statements, hops - 1)
            if found is None or len(found) != 1:
                return None
            means |= found
    return means


@settings(max_examples=500)
@given(_statements, _references)
def test_it_agrees_with_the_definition(
    statements: list[AliasStatement], reference: DelegatedReference
) -> None:
    expected = naive(reference, statements, MAX_HOPS)
    if expected is not None and len(expected) == 1:
        found = resolved(reference, statements)
        assert {found.digest} == expected
        assert found.delegation[0].reference == str(reference)
        stating = {s.digest_sha384 for s in statements if s.alias == reference.alias}
        assert found.delegation[0].statement_digest_sha384 in stating
    else:
        unresolved(reference, statements)
