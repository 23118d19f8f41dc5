"""Which images may share a TD (ACON image spec 1.0, "Launch Policy").

Executable images are the vertices of a graph, "A's policy accepts B" is an edge from A to
B. The graph is valid when from every image that rejects the unaccepted every image can be
reached. Images without an entry point are no vertices: they run nothing, and only those
who delegated to their signer use what they lend.

Sets of vertices are integers, bit i for vertex i: for some hundreds of images that is
both the shortest and the fastest form.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import msgspec

from supervisor.formats.errors import PolicyDenied
from supervisor.formats.ids import ImageId
from supervisor.formats.manifest import AcceptRule
from supervisor.formats.references import split_alias
from supervisor.formats.signature import SignedManifest

# How many subsets are tried one by one before the smallest group is only approximated.
_MAX_TRIED_SUBSETS = 2048
# Around how many images a small group is then looked for.
_MAX_SEEDS = 64
# How many images a refusal names.
_SHOWN_IMAGES = 4


class Violation(msgspec.Struct, frozen=True):
    """`image_id` rejects the unaccepted and cannot reach `unreachable`.

    `mend` says in words which rules in its own policy would be enough.
    """

    image_id: ImageId
    unreachable: tuple[ImageId, ...]
    mend: str


def accepts(rule: AcceptRule, other: SignedManifest) -> bool:
    """Whether one rule accepts an image.

    A target `Name:SVN` accepts an image that calls itself `Name` with at least that SVN;
    an alias without SVN must be the same; a digest is never compared with an alias.
    """
    image_id = other.image_id
    if rule.algorithm != image_id.algorithm or rule.signer not in ("*", image_id.signer):
        return False
    if rule.target == "*":
        return True
    if rule.names_digest:
        return rule.target == image_id.manifest
    if rule.target in other.manifest.self_aliases:
        return True
    name, least_svn = split_alias(rule.target)
    if least_svn is None:
        return False
    for alias in other.manifest.self_aliases:
        other_name, svn = split_alias(alias)
        if other_name == name and svn is not None and svn >= least_svn:
            return True
    return False


def violations(images: Sequence[SignedManifest]) -> tuple[Violation, ...]:
    """All that is wrong with these images sharing a TD, in the images' order; none if valid."""
    graph = _Graph(images)
    return graph.violations(graph.everything)


def violations_after_each(
    groups: Sequence[Sequence[SignedManifest]],
) -> Iterator[tuple[Violation, ...]]:
    """What is wrong once each group has joined those before it, as `violations` says it.

    One graph serves all groups, so that a verifier can repeat a long log's admissions.
    """
    graph = _Graph([image for group in groups for image in group])
    present = 0
    for group in groups:
        present |= graph.set_of(group)
        yield graph.violations(present)


def require_admissible(images: Sequence[SignedManifest]) -> None:
    """Raise `PolicyDenied` unless these images may share a TD.

    The refusal names the first image that rejects others, whom, and the rule that would
    mend it.
    """
    found = violations(images)
    if found:
        raise _denied(found)


def admissible_groups(
    loaded: Sequence[SignedManifest], wanted: Sequence[SignedManifest]
) -> tuple[tuple[SignedManifest, ...], ...]:
    """An order of groups in which `wanted` can be admitted to a TD that has `loaded`.

    First, as one group, the images without entry point. Then, again and again, the first
    image that can be admitted alone, or else the smallest group found (certainly the
    smallest while there are few images; otherwise a small one). What is loaded already, or
    wanted twice, is left out. The result depends on nothing but the two sequences.

    Raises `PolicyDenied` when there is no order, which is so exactly when all of them
    together are not admissible.
    """
    present = {image.image_id for image in loaded}
    new: dict[ImageId, SignedManifest] = {}
    for image in wanted:
        if image.image_id not in present:
            new.setdefault(image.image_id, image)
    groups: list[tuple[SignedManifest, ...]] = []
    lenders = tuple(image for image in new.values() if not image.manifest.is_executable)
    if lenders:
        groups.append(lenders)
    graph = _Graph([*loaded, *new.values()])
    found = graph.violations(graph.everything)
    if found:
        raise _denied(found)
    admitted = graph.set_of(loaded)
    while admitted != graph.everything:
        group = graph.next_group(admitted)
        groups.append(tuple(graph.images[i] for i in _members(group)))
        admitted |= group
    return tuple(groups)


def _denied(found: tuple[Violation, ...]) -> PolicyDenied:
    first = found[0]
    more = f" ({len(found) - 1} more images reject others)" if len(found) > 1 else ""
    return PolicyDenied(
        str(first.image_id),
        "an image that rejects the unaccepted must reach every image through the images' "
        f"launch policies{more}; to mend it, {first.mend}",
        expected="every image reachable",
        actual=f"cannot reach {_listed([str(i) for i in first.unreachable])}",
    )


def _listed(texts: Sequence[str]) -> str:
    shown = " and ".join(texts[:_SHOWN_IMAGES])
    rest = len(texts) - _SHOWN_IMAGES
    return f"{shown} and {rest} more" if rest > 0 else shown


def _members(vertices: int) -> Iterator[int]:
    """The vertices of a set, lowest first."""
    while vertices:
        lowest = vertices & -vertices
        yield lowest.bit_length() - 1
        vertices ^= lowest


class _Index:
    """Vertices by what a rule can ask for, so that a rule is not compared with each image."""

    def __init__(self, images: Sequence[SignedManifest]) -> None:
        self._all: dict[tuple[str, str], int] = {}
        self._manifest: dict[tuple[str, str, str], int] = {}
        self._alias: dict[tuple[str, str, str], int] = {}
        self._svn: dict[tuple[str, str, str], list[tuple[int, int]]] = {}
        for vertex, image in enumerate(images):
            bit = 1 << vertex
            image_id = image.image_id
            for signer in (image_id.signer, "*"):
                by_signer = (image_id.algorithm, signer)
                self._all[by_signer] = self._all.get(by_signer, 0) | bit
                key = (*by_signer, image_id.manifest)
                self._manifest[key] = self._manifest.get(key, 0) | bit
                for alias in image.manifest.self_aliases:
                    key = (*by_signer, alias)
                    self._alias[key] = self._alias.get(key, 0) | bit
                    name, svn = split_alias(alias)
                    if svn is not None:
                        self._svn.setdefault((*by_signer, name), []).append((svn, bit))

    def accepted_by(self, rule: AcceptRule) -> int:
        """The vertices for which `accepts` holds."""
        if rule.target == "*":
            return self._all.get((rule.algorithm, rule.signer), 0)
        key = (rule.algorithm, rule.signer, rule.target)
        if rule.names_digest:
            return self._manifest.get(key, 0)
        accepted = self._alias.get(key, 0)
        name, least_svn = split_alias(rule.target)
        if least_svn is not None:
            for svn, bit in self._svn.get((rule.algorithm, rule.signer, name), ()):
                if svn >= least_svn:
                    accepted |= bit
        return accepted


class _Graph:
    def __init__(self, images: Sequence[SignedManifest]) -> None:
        unique: dict[ImageId, SignedManifest] = {}
        for image in images:
            if image.manifest.is_executable:
                unique.setdefault(image.image_id, image)
        self.images = list(unique.values())
        self.everything = (1 << len(self.images)) - 1
        self._vertex = {image.image_id: i for i, image in enumerate(self.images)}
        index = _Index(self.images)
        self._accepted: list[int] = []
        self._accepting = [0] * len(self.images)
        self._rejecting = 0
        # Many images of one owner accept the same: edges are turned round once for all of
        # them, or else a hundred images that accept each other would cost 10,000 steps.
        who_accepts: dict[int, int] = {}
        for vertex, image in enumerate(self.images):
            accepted = 0
            for rule in image.manifest.policy.accepts:
                accepted |= index.accepted_by(rule)
            self._accepted.append(accepted)
            who_accepts[accepted] = who_accepts.get(accepted, 0) | 1 << vertex
            if image.manifest.policy.reject_unaccepted:
                self._rejecting |= 1 << vertex
        for accepted, vertices in who_accepts.items():
            for other in _members(accepted):
                self._accepting[other] |= vertices

    def set_of(self, images: Sequence[SignedManifest]) -> int:
        vertices = 0
        for image in images:
            vertex = self._vertex.get(image.image_id)
            if vertex is not None:
                vertices |= 1 << vertex
        return vertices

    def is_valid(self, present: int) -> bool:
        """Whether these vertices alone are a valid graph.

        One rejecting vertex that reaches all, and is reached by all rejecting ones, says
        the same as each of them reaching all.
        """
        rejecting = present & self._rejecting
        if not rejecting:
            return True
        one = rejecting & -rejecting
        if _reach(one, present, self._accepted) != present:
            return False
        return not rejecting & ~_reach(one, present, self._accepting)

    def violations(self, present: int) -> tuple[Violation, ...]:
        if self.is_valid(present):
            return ()
        reach = {v: _reach(1 << v, present, self._accepted) for v in _members(present)}
        found = []
        for vertex in _members(present & self._rejecting):
            missing = present & ~reach[vertex]
            if missing:
                found.append(
                    Violation(
                        self.images[vertex].image_id,
                        tuple(self.images[i].image_id for i in _members(missing)),
                        self._mend(vertex, missing, reach),
                    )
                )
        return tuple(found)

    def _mend(self, vertex: int, missing: int, reach: dict[int, int]) -> str:
        """Direct rules that make `missing` reachable, as few as a greedy choice finds."""
        rules: list[str] = []
        while missing and len(rules) < _SHOWN_IMAGES:
            best = max(
                _members(missing), key=lambda other: ((reach[other] & missing).bit_count(), -other)
            )
            rules.append(str(self.images[best].image_id))
            missing &= ~reach[best]
        rest = f" and rules for {missing.bit_count()} more images" if missing else ""
        return (
            f"{self.images[vertex].image_id} could list in its policy.accepts "
            f"{' and '.join(rules)}{rest}"
        )

    def next_group(self, admitted: int) -> int:
        """A small set of further vertices that can be admitted together.

        There is one: the whole graph is valid, so all of the rest is.
        """
        rest = self.everything & ~admitted
        for vertex in _members(rest):
            if self.is_valid(admitted | 1 << vertex):
                return 1 << vertex
        group = rest
        for seed in itertools.islice(_members(rest), _MAX_SEEDS):
            group = self._grown(seed, admitted, group)
        group = self._without_the_spare(group, admitted)
        tried = 0
        # Two at least: alone, none can be admitted.
        for size in range(2, group.bit_count()):
            for members in itertools.combinations(_members(rest), size):
                tried += 1
                if tried > _MAX_TRIED_SUBSETS:
                    return group
                candidate = sum(1 << vertex for vertex in members)
                if self.is_valid(admitted | candidate):
                    return candidate
        return group

    def _grown(self, seed: int, admitted: int, best: int) -> int:
        """A set around `seed` that can be admitted, or `best` if it would not be smaller."""
        present = admitted | 1 << seed
        while not self.is_valid(present):
            present |= self._missing_path(present)
            if (present & ~admitted).bit_count() >= best.bit_count():
                return best
        return present & ~admitted

    def _without_the_spare(self, group: int, admitted: int) -> int:
        """`group` without those members that it can be admitted without."""
        for vertex in _members(group):
            if self.is_valid(admitted | group & ~(1 << vertex)):
                group &= ~(1 << vertex)
        return group

    def _missing_path(self, present: int) -> int:
        """The vertices of a shortest path, in the whole graph, from a rejecting vertex of
        `present` to one that it cannot reach within `present`."""
        for vertex in _members(present & self._rejecting):
            missing = present & ~_reach(1 << vertex, present, self._accepted)
            if missing:
                return self._shortest_path(vertex, missing)
        return self.everything

    def _shortest_path(self, start: int, goals: int) -> int:
        came_from: dict[int, int] = {}
        seen = frontier = 1 << start
        while frontier:
            following = 0
            for vertex in _members(frontier):
                new = self._accepted[vertex] & ~seen & ~following
                following |= new
                for other in _members(new):
                    came_from[other] = vertex
            hit = following & goals
            if hit:
                vertex = (hit & -hit).bit_length() - 1
                path = 1 << vertex
                while vertex != start:
                    vertex = came_from[vertex]
                    path |= 1 << vertex
                return path
            seen |= following
            frontier = following
        return self.everything


def _reach(start: int, present: int, edges: Sequence[int]) -> int:
    """All vertices of `present` that can be reached from `start` through `present`."""
    reached = frontier = start
    while frontier and reached != present:
        following = 0
        for vertex in _members(frontier):
            following |= edges[vertex]
        frontier = following & present & ~reached
        reached |= frontier
    return reached
