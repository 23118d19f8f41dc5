"""What `acon load` says while it works: bars and lines for people, JSON lines for programs."""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TypeAlias

from acon.output import Bar, Progress, remark, say, write_json
from acon.short_ids import shortened
from supervisor.formats.digest import Digest
from supervisor.formats.errors import Refusal
from supervisor.formats.signature import SignedManifest
from supervisor.operations import ImageView

# The daemon fetched it, or it was read here and sent.
How: TypeAlias = Literal["fetched", "sent"]
State: TypeAlias = Literal["already there", "verified", "failed"]
# Read here for its digest; fetched by the daemon; got from a registry; sent to the daemon.
Step: TypeAlias = Literal["check", "fetch", "get", "send"]

# Between two lines about one layer's progress.
_PAUSE_S = 1.0
_SHOWN_DIGITS = 12


class LoadReport:
    """One load's. With `--json` everything is a line on standard output, warnings too."""

    def __init__(self, args: argparse.Namespace, bars: Progress) -> None:
        self._as_json = bool(args.json)
        self._bars = bars
        self._writing = threading.Lock()

    def warning(self, text: str) -> None:
        if self._as_json:
            self._write({"event": "warning", "message": text})
        else:
            remark(f"warning: {text}")

    def admitted(self, group: Sequence[SignedManifest]) -> None:
        lines = ["admitted" if len(group) == 1 else f"admitted together, {len(group)} images"]
        for signed in group:
            names = ", ".join(signed.manifest.self_aliases)
            lines.append(shortened(f"  {signed.image_id}  {names}").rstrip())
        ids = [str(signed.image_id) for signed in group]
        self._tell({"event": "admitted", "image_ids": ids}, "\n".join(lines))

    def layer(
        self,
        digest: Digest,
        state: State,
        *,
        how: How | None = None,
        error: Refusal | OSError | None = None,
    ) -> None:
        """How it stands with a layer, how it came if it did, why not if it did not."""
        event: dict[str, object] = {"event": "layer", "digest": str(digest), "state": state}
        text = shortened(f"layer {digest}: {state}")
        if how is not None:
            event["how"] = how
        if error is not None:
            event["error"] = _facts(error)
            text += f": {error}"
        self._tell(event, text)

    def incomplete(self, view: ImageView) -> None:
        """An image that cannot start yet."""
        # A layer that was left to somebody whose image is not here.
        left = any(missing.startswith("signer/") for missing in view.missing_layers)
        hint = "; before the seal, load the vendor's image that gives this name" if left else ""
        self._tell(
            {"event": "incomplete", "image_id": view.image_id, "missing": view.missing_layers},
            shortened(f"cannot start yet: {view.image_id} lacks {', '.join(view.missing_layers)}")
            + hint,
        )

    @contextmanager
    def step(self, digest: Digest, step: Step, total_bytes: int | None) -> Iterator[Bar]:
        """How far a layer is with one step; its bar is gone after the block."""
        bar = self._bars.begin(f"{step:<5} {digest.hex[:_SHOWN_DIGITS]}", total_bytes)
        try:
            yield _StepBar(self, bar, digest, step, total_bytes) if self._as_json else bar
        finally:
            bar.end()

    def progress(
        self, digest: Digest, step: Step, done_bytes: int, total_bytes: int | None
    ) -> None:
        """For programs; people have bars. From any thread."""
        event = {
            "event": "progress",
            "digest": str(digest),
            "step": step,
            "done_bytes": done_bytes,
            "total_bytes": total_bytes,
        }
        self._write(event)

    def _tell(self, event: object, text: str) -> None:
        if self._as_json:
            self._write(event)
        else:
            say(text)

    def _write(self, event: object) -> None:
        with self._writing:
            write_json(event, lines=True)


class _StepBar:
    """A `Bar` that says every now and then how far it is."""

    def __init__(
        self,
        report: LoadReport,
        bar: Bar,
        digest: Digest,
        step: Step,
        total_bytes: int | None,
    ) -> None:
        self._report = report
        self._bar = bar
        self._digest = digest
        self._step: Step = step
        self._done_bytes = 0
        self._total_bytes = total_bytes
        self._told_s = time.monotonic()

    def advance(self, count_bytes: int) -> None:
        self.reach(self._done_bytes + count_bytes, self._total_bytes)

    def reach(self, done_bytes: int, total_bytes: int | None) -> None:
        self._bar.reach(done_bytes, total_bytes)
        self._done_bytes, self._total_bytes = done_bytes, total_bytes
        now_s = time.monotonic()
        if now_s - self._told_s >= _PAUSE_S:
            self._told_s = now_s
            self._report.progress(self._digest, self._step, done_bytes, total_bytes)

    def end(self) -> None:
        self._bar.end()


def _facts(error: Refusal | OSError) -> dict[str, str | None]:
    if isinstance(error, Refusal):
        return error.to_dict()
    return Refusal(str(error.filename), "cannot be read", actual=error.strerror).to_dict()
