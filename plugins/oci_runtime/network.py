"""From which port on every user of the TD's own network may listen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from supervisor import RuntimeFailed

# ip(7): of the network namespace of whoever writes it.
PORT_START = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")


@contextmanager
def machine_ports_from(start: int | None) -> Iterator[None]:
    """Set it for as long as the block lasts; None: leave it alone. Raises `RuntimeFailed`."""
    if start is None:
        yield
        return
    try:
        before = PORT_START.read_text()
        PORT_START.write_text(str(start))
    except OSError as error:
        raise RuntimeFailed(
            "plugin.oci_runtime.unprivileged_port_start",
            "must be settable in the TD's network",
            expected=start,
            actual=error,
        ) from error
    try:
        yield
    finally:
        PORT_START.write_text(before)
