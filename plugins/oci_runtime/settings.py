"""The plugin's table in the configuration. All of it is measured."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Mebibytes = Annotated[int, msgspec.Meta(ge=1, le=1_048_576)]
SHARED, OWN = "shared", "own"


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`runtime` and `seccomp_profile` take `auto` or an absolute path, the latter also
    `builtin`. `scratch_size_mib` bounds one container's `/tmp` and `/run` together,
    `shared_size_mib` the `/shared` of all of them.

    `network`: the TD's for all containers, or one of its own, with `lo` alone, for each.
    `unprivileged_port_start`: from which port on every user there may listen (None: as the
    kernel has it).

    Limits protect neighbours; they are no promise to anyone who verifies.
    `memory_limit_mib`: None is half of the machine's memory; `cpu_limit_percent`: 100 is
    one core, None as much as the others leave; `max_invocations` under way per container.
    """

    runtime: str = "auto"
    seccomp_profile: str = "auto"
    scratch_size_mib: Mebibytes = 256
    shared_size_mib: Mebibytes = 64
    parallel_starts: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 8
    start_timeout_s: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 30
    network: Literal["shared", "own"] = "shared"
    unprivileged_port_start: Annotated[int, msgspec.Meta(ge=0, le=65_535)] | None = None
    memory_limit_mib: Annotated[int, msgspec.Meta(ge=16, le=1_048_576)] | None = None
    cpu_limit_percent: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    pids_limit: Annotated[int, msgspec.Meta(ge=32, le=4_194_304)] = 1024
    max_invocations: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 8
