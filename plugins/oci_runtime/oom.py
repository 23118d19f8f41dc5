"""Whom the kernel kills when the whole machine is out of memory.

What containers hold in memory files, `/tmp` or a writable root is no process's own: by its
usual reckoning the kernel would take the largest processes, first of all the supervisor,
while who filled the memory is small. So the supervisor is spared as far as the kernel lets
it, and its containers are not (proc(5), "oom_score_adj").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OWN_SCORE = Path("/proc/self/oom_score_adj")
# The worker of a decompressor and other helpers have it too: not quite out of reach (-1000).
SPARED = -900


@contextmanager
def spared_by_the_oom_killer() -> Iterator[int]:
    """For as long as the block lasts, where it is allowed (CAP_SYS_RESOURCE).

    Yields what a container has to be given, which would inherit it else: what the supervisor
    itself was started with, but never less than the usual 0. Raises `OSError`.
    """
    before = int(OWN_SCORE.read_text(encoding="ascii"))
    if before > SPARED:
        with suppress(OSError):
            OWN_SCORE.write_text(str(SPARED), encoding="ascii")
    try:
        yield max(before, 0)
    finally:
        with suppress(OSError):
            OWN_SCORE.write_text(str(before), encoding="ascii")
