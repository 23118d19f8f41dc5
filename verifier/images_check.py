"""Which images were admitted: signed, accepting each other, and exactly those expected."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from supervisor.formats.launch_policy import Violation, violations_after_each
from supervisor.formats.log_events import AdmitImagesEvent
from supervisor.formats.signature import SignedManifest
from verifier.images import ImageSet, certificate_of, matches, names_of
from verifier.log_check import LOG_ANCHOR
from verifier.log_reading import SupervisorLog
from verifier.policy import ImageEntry, Policy
from verifier.verdict import Check, group, judge, unmade

_SIGNATURES = "the images' own signatures"


def check_images(log: SupervisorLog, images: ImageSet, policy: Policy, at: datetime) -> Check:
    """Everything about the images that the log admits, at the verifier's own time."""
    return group(
        "images",
        "The images that were admitted",
        [
            _signatures(images),
            _complete(log, images),
            _certificate_dates(log, images, policy, at),
            _launch_policy(log, images),
            _expected(log, images, policy),
        ],
    )


def _signatures(images: ImageSet) -> Check:
    wrong = [f"image {broken.index}: {broken.error}" for broken in images.broken]
    return judge(
        "images.signatures",
        "Every manifest carries a valid signature of its signer",
        holds=not wrong,
        expected=f"{images.count} valid signatures",
        actual="; ".join(wrong) or f"{images.count} valid signatures",
        anchor=_SIGNATURES,
    )


def _complete(log: SupervisorLog, images: ImageSet) -> Check:
    admitted = set(log.admitted())
    missing = [f"{id} is not in the evidence" for id in sorted(admitted - images.by_id.keys())]
    extra = [f"{id} was never admitted" for id in sorted(images.by_id.keys() - admitted)]
    if repeated := images.count - len(images.by_id) - len(images.broken):
        extra.append(f"{repeated} images are in the evidence twice")
    return judge(
        "images.complete",
        "The evidence holds the manifests of exactly the admitted images",
        holds=not missing and not extra,
        expected=f"the {len(admitted)} admitted images",
        actual="; ".join(missing + extra) or f"the {len(admitted)} admitted images",
        anchor=LOG_ANCHOR,
    )


def _certificate_dates(log: SupervisorLog, images: ImageSet, policy: Policy, at: datetime) -> Check:
    id, title = "images.certificate_dates", "The signers' certificates are in date"
    wrong = []
    for signed in images.of(log.admitted()):
        certificate = certificate_of(signed)
        try:
            first, last = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        except ValueError:
            wrong.append(f"{_called(signed)}: the certificate's dates cannot be read")
            continue
        if not first <= at <= last:
            wrong.append(f"{_called(signed)}: {first.isoformat()} to {last.isoformat()}")
    actual = "; ".join(wrong) or "all in date"
    if policy.certificates.dates == "ignored":
        return unmade(
            id,
            title,
            why='the policy says "ignored"',
            actual=actual,
            left_open=True,
            policy_rule="certificates.dates",
        )
    return judge(
        id,
        title,
        holds=not wrong,
        expected=f"in date at {at.isoformat()}",
        actual=actual,
        anchor="the verifier's clock",
        policy_rule="certificates.dates",
    )


def _launch_policy(log: SupervisorLog, images: ImageSet) -> Check:
    """Recompute, after each admission, whether all images until then accept each other."""
    id, title = "images.launch_policy", "The images accept each other"
    admissions = list(log.of(AdmitImagesEvent))
    if not admissions:
        return judge(
            id,
            title,
            holds=True,
            expected="all of them",
            actual="no image was admitted",
            anchor=LOG_ANCHOR,
        )
    groups = [images.of(event.image_ids) for _, event in admissions]
    found = violations_after_each(groups)
    checks: list[Check] = []
    ground_lost: str | None = None
    for (entry, event), group_images in zip(admissions, groups, strict=True):
        group_title = f"After record {entry.position} all images accept each other"
        if ground_lost is None and len(group_images) < len(event.image_ids):
            ground_lost = "the evidence lacks manifests of images admitted by then"
        if ground_lost is not None:
            checks.append(
                unmade(
                    f"{id}.group",
                    group_title,
                    why=ground_lost,
                    actual="unknown",
                    left_open=False,
                )
            )
            continue
        broken = next(found)
        checks.append(_group_policy(f"{id}.group", group_title, broken))
        if broken:
            ground_lost = "they did not even before this admission"
    return group(id, title, checks)


def _group_policy(id: str, title: str, broken: Sequence[Violation]) -> Check:
    return judge(
        id,
        title,
        holds=not broken,
        expected="every image that rejects the unaccepted reaches every other",
        actual="; ".join(
            f"{violation.image_id} does not accept "
            + ", ".join(str(other) for other in violation.unreachable)
            for violation in broken
        )
        or "they do",
        anchor=_SIGNATURES,
    )


# --- against the policy ---------------------------------------------------------------------


def _expected(log: SupervisorLog, images: ImageSet, policy: Policy) -> Check:
    id, title = "images.expected", "The images are those that the policy expects"
    # An image whose manifest is missing may be anything, so it counts as a program.
    programs: list[str] = []
    layer_only: list[str] = []
    for image_id in dict.fromkeys(log.admitted()):
        signed = images.get(image_id)
        executable = signed is None or signed.manifest.is_executable
        (programs if executable else layer_only).append(image_id)
    if isinstance(policy.images, str):
        return unmade(
            id,
            title,
            why='the policy says "unpinned"',
            actual=f"{len(programs)} programs, {len(layer_only)} images that lend layers",
            left_open=True,
            policy_rule="images",
        )
    assigned = _assign(policy.images.executable, programs, images)
    lending = [
        [id for id in layer_only if matches(entry, id, images.get(id))]
        for entry in policy.images.layer_only
    ]
    found = {*assigned.values(), *(id for ids in lending for id in ids)}
    unexpected = [id for id in (*programs, *layer_only) if id not in found]
    return group(
        id,
        title,
        [
            *(
                _entry(entry, f"images.executable[{index}]", assigned.get(index), images)
                for index, entry in enumerate(policy.images.executable)
            ),
            # Several may satisfy one entry here, since none of them can run.
            *(
                _entry(entry, f"images.layer_only[{index}]", next(iter(ids), None), images)
                for index, (entry, ids) in enumerate(
                    zip(policy.images.layer_only, lending, strict=True)
                )
            ),
            *(_unexpected(unexpected, images, exact=policy.images.exact)),
        ],
    )


def _entry(entry: ImageEntry, rule: str, found: str | None, images: ImageSet) -> Check:
    return judge(
        "images.expected.entry",
        "An image that the policy expects is there",
        holds=found is not None,
        expected=str(entry),
        actual="no admitted image" if found is None else _described(found, images),
        anchor=LOG_ANCHOR,
        policy_rule=rule,
    )


def _unexpected(image_ids: Sequence[str], images: ImageSet, *, exact: bool) -> list[Check]:
    """One leaf for each image that no entry of the policy means."""
    id, title = "images.unexpected", "No image is there that the policy does not expect"
    rule = "images.exact"
    if exact:
        return [
            judge(
                id,
                title,
                holds=not image_ids,
                expected="only the images of the policy",
                actual=actual,
                anchor=LOG_ANCHOR,
                policy_rule=rule,
            )
            for actual in [_described(image, images) for image in image_ids] or ["only those"]
        ]
    return [
        unmade(
            id,
            title,
            why="the policy allows further images (exact = false)",
            actual=actual,
            left_open=True,
            policy_rule=rule,
        )
        for actual in [_described(image, images) for image in image_ids] or ["none, this time"]
    ]


def _assign(
    entries: Sequence[ImageEntry], admitted: Sequence[str], images: ImageSet
) -> dict[int, str]:
    """Entry index -> image id, one to one and as many as can be (augmenting paths, Kuhn).

    One to one, because otherwise a second image of the same signer and name would hide
    behind the first.
    """
    holder: dict[str, int] = {}

    def place(index: int, tried: set[str]) -> bool:
        for image_id in admitted:
            if image_id in tried or not matches(entries[index], image_id, images.get(image_id)):
                continue
            tried.add(image_id)
            if image_id not in holder or place(holder[image_id], tried):
                holder[image_id] = index
                return True
        return False

    # By id first: those have no choice.
    for index in sorted(range(len(entries)), key=lambda index: entries[index].id is None):
        place(index, set())
    return {index: image_id for image_id, index in holder.items()}


def _described(image_id: str, images: ImageSet) -> str:
    signed = images.get(image_id)
    return image_id if signed is None else f"{_called(signed)} ({image_id})"


def _called(signed: SignedManifest) -> str:
    return ", ".join(names_of(signed)) or str(signed.image_id)
