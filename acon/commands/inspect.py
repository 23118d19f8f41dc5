"""`acon inspect`: everything that is known of one container."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from acon.arguments import SubParsers, add_command, add_container

if TYPE_CHECKING:
    from collections.abc import Sequence

    from acon.client import Client
    from acon.container_client import ListedContainer
    from supervisor.formats.manifest import Manifest

_DETAILS = """\
What the daemon says of it, and what its image's manifest does. All values are whole.
The signature of the manifest is not judged here: `acon verify` does that, on evidence."""


def add_parser(sub: SubParsers) -> None:
    parser = add_command(
        sub,
        "inspect",
        summary="show everything about one container",
        details=_DETAILS,
        example="acon inspect gateway\nacon inspect 3 --json",
        run=run,
        daemon=True,
    )
    add_container(parser)


def run(args: argparse.Namespace) -> int:
    from acon.container_facts import facts_of
    from acon.daemon import converse
    from acon.output import result

    container, names, manifest = converse(args, lambda client: _ask(args, client))
    facts = facts_of(container, names) | _facts_of_manifest(manifest)
    result(args, facts, "\n".join(_lines(container, names, manifest)))
    return 0


async def _ask(
    args: argparse.Namespace, client: Client
) -> tuple[ListedContainer, tuple[str, ...], Manifest]:
    from acon.container_facts import names_of_images
    from acon.container_names import container_id_of
    from supervisor.formats.manifest import parse_manifest

    container = await client.container(await container_id_of(client, args.container))
    names = await names_of_images(client)
    # It was admitted: whether it may use SHA-256 was decided then.
    manifest = parse_manifest(await client.manifest(container.image_id), unsafe_allow_sha256=True)
    return container, names.get(container.image_id, ()), manifest


def _facts_of_manifest(manifest: Manifest) -> dict[str, object]:
    return {
        "layer_references": [str(layer) for layer in manifest.layers],
        "working_dir": manifest.working_dir,
        "uids": list(manifest.uids),
        "writable_root": manifest.writable_fs,
        "no_restart": manifest.no_restart,
        "max_instances": manifest.max_instances,
    }


def _lines(one: ListedContainer, names: Sequence[str], manifest: Manifest) -> list[str]:
    from acon.container_facts import signer_of
    from acon.human import ago, size, state_in_words, utc_now
    from acon.signals import listed_signal

    layers = one.layers or [str(layer) for layer in manifest.layers]
    rows: list[tuple[str, Sequence[str]]] = [
        ("container", [str(one.container_id)]),
        ("image", [one.image_id]),
        ("names", [", ".join(names) or "none"]),
        ("signer", [signer_of(one.image_id)]),
        ("state", [state_in_words(one)]),
        ("since", [f"{one.since} ({ago(one.since, utc_now())})"]),
        ("pid", ["-" if one.pid is None else str(one.pid)]),
        ("memory", [size(one.memory_bytes)]),
        ("restarts", [str(one.restarts)]),
        ("restart", [_restart_in_words(one, manifest)]),
        ("command", [_quoted(one.argv)]),
        ("environment", one.environment or ["none"]),
        ("starts in", [manifest.working_dir]),
        ("root", ["can be written" if manifest.writable_fs else "read-only"]),
        ("uids", [", ".join(str(uid) for uid in (0, *manifest.uids))]),
        ("signals", [listed_signal(signum) for signum in one.signals] or ["none"]),
        ("log fds", [", ".join(str(fd) for fd in one.log_fds) or "none"]),
        ("instances", [f"at most {manifest.max_instances}" if manifest.max_instances else "any"]),
        ("layers", _layers_in_words(layers, manifest)),
        ("start event", [f"sha384 {one.start_event_digest_sha384}"]),
    ]
    return [
        f"{name if number == 0 else '':<12} {value}".replace("\n", "\\n")
        for name, values in rows
        for number, value in enumerate(values)
    ]


def _restart_in_words(one: ListedContainer, manifest: Manifest) -> str:
    if manifest.no_restart:
        return "its manifest forbids it"
    return "possible" if one.restartable else "what it wrote is no longer kept"


def _quoted(argv: Sequence[str]) -> str:
    import shlex

    return shlex.join(argv)


def _layers_in_words(layers: Sequence[str], manifest: Manifest) -> list[str]:
    """Lowest first; a delegated one with what the manifest calls it."""
    words = []
    for layer, reference in zip(layers, manifest.layers, strict=False):
        left = str(reference)
        words.append(layer if layer == left else f"{layer}, left to {left}")
    return words or ["none"]
