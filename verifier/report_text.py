"""The verdict in plain words, for someone who must decide and is no TDX engineer.

Whatever stems from the evidence is made inert, and stands on lines that begin with a
bar: no name or variable can pass itself off as a line of the verdict.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence

from verifier.facts import (
    AttestationDataFact,
    Facts,
    ImageFact,
    LayerFact,
    StartFact,
    SupervisorFact,
)
from verifier.headline import headline, to_believe
from verifier.inert_text import inert
from verifier.verdict import Check, Outcome, Verdict

MIN_WIDTH = 40
# 64 bits tell digests apart for a reader; `details` and the JSON report have them whole.
_SHORT_DIGITS = 16
_LONG_HEX = re.compile(r"[0-9a-f]{33,}")
_MARKS = {Outcome.PASS: "pass", Outcome.FAIL: "FAIL", Outcome.NOT_CHECKED: "open"}
_COLOURS = {"pass": "\x1b[32m", "FAIL": "\x1b[1;31m", "open": "\x1b[33m", "bold": "\x1b[1m"}
_RESET = "\x1b[0m"


def render_text(
    verdict: Verdict, *, width: int = 80, colour: bool = False, details: bool = False
) -> str:
    """The report, ending with a newline. `width` is the terminal's, at least 40 columns;
    `colour` adds ANSI colours; `details` unfolds every check and writes digests in full."""
    page = _Page(max(width, MIN_WIDTH), colour, details)
    facts = verdict.facts
    title = "VERDICT: " + ("PASSED" if verdict.ok else "FAILED")
    if verdict.trust_anchor.kind != "intel":
        title += " (SIMULATION)"
    page.heading(title)
    page.say(page.digest(headline(verdict)))
    if verdict.trust_anchor.kind != "intel":
        page.say(
            "This quote was not judged under Intel's root but under a root that the caller "
            "chose. It says nothing about real hardware: whoever holds that root's key can "
            "make it say anything."
        )
    page.say(f"Judged at {verdict.judged_at}. The root that decides:")
    page.quote(verdict.trust_anchor.name)
    if not verdict.ok:
        _problems(page, verdict)
    if not facts.authentic:
        page.heading("What follows is what the evidence CLAIMS; nobody vouches for it")
    _programs(page, facts)
    _lenders(page, facts)
    _loading(page, facts)
    _supervisors(page, facts)
    _speaker(page, facts)
    _platform(page, facts)
    _checks(page, verdict)
    _beliefs(page, verdict)
    return page.text()


class _Page:
    """Lines of bounded width. Everything that is not `say` or `heading` is a stranger's."""

    def __init__(self, width: int, colour: bool, details: bool) -> None:
        self.width = width
        self.colour = colour
        self.details = details
        self._lines: list[str] = []

    def heading(self, text: str) -> None:
        self._lines += ["", *(self._painted("bold", line) for line in self._wrapped(text, "", ""))]

    def say(self, text: str, *, indent: int = 0) -> None:
        margin = " " * indent
        self._lines += self._wrapped(inert(text), margin, margin)

    def quote(self, text: str, *, indent: int = 2, label: str = "") -> None:
        """A stranger's text, behind a bar on every line that it takes."""
        bar = " " * indent + "| "
        self._lines += self._wrapped(label + inert(text), bar, bar + " " * min(len(label), 12))

    def mark(self, outcome: Outcome, text: str, *, indent: int) -> None:
        mark = _MARKS[outcome]
        margin = " " * indent
        lines = self._wrapped(f"[{mark}] {inert(text)}", margin, margin + " " * 7)
        first = lines[0].replace(f"[{mark}]", self._painted(mark, f"[{mark}]"), 1)
        self._lines += [first, *lines[1:]]

    def digest(self, text: str) -> str:
        """Digests within a text, cut for reading unless details are wanted."""
        return text if self.details else _LONG_HEX.sub(_shortened, text)

    def text(self) -> str:
        return "\n".join(self._lines).lstrip("\n") + "\n"

    def _wrapped(self, text: str, first: str, rest: str) -> list[str]:
        return textwrap.wrap(
            text,
            self.width,
            initial_indent=first,
            subsequent_indent=rest,
            break_on_hyphens=False,
        ) or [first.rstrip()]

    def _painted(self, name: str, text: str) -> str:
        return f"{_COLOURS[name]}{text}{_RESET}" if self.colour else text


def _problems(page: _Page, verdict: Verdict) -> None:
    page.heading("Why it failed")
    for leaf in verdict.failures:
        _leaf(page, leaf, indent=0)
    for leaf in verdict.unchecked:
        if not leaf.left_open:
            _leaf(page, leaf, indent=0)


# --- facts ----------------------------------------------------------------------------------


def _programs(page: _Page, facts: Facts) -> None:
    page.heading(f"Programs that may run here: {len(facts.images)}, in the order of admission")
    if not facts.images:
        page.say("None.")
    for number, image in enumerate(facts.images, start=1):
        _image(page, number, image)
        starts = [start for start in facts.starts if start.image_id == image.image_id]
        for start in starts:
            _start(page, start)
        if not starts:
            page.say("never started", indent=5)


def _image(page: _Page, number: int, image: ImageFact) -> None:
    names = ", ".join(image.names) or "(no name)"
    page.quote(names, indent=0, label=f"{number:>2}. name   ")
    page.quote(page.digest(image.image_id), indent=0, label="    image  ")
    page.quote(
        f"{page.digest(image.signer)}, who calls itself {image.signer_subject}",
        indent=0,
        label="    signer ",
    )


def _start(page: _Page, start: StartFact) -> None:
    if start.container_ids:
        containers = ", ".join(str(one) for one in start.container_ids)
        page.say(f"running as container {containers}, started as:", indent=5)
    else:
        page.say("allowed to run (not running now), started as:", indent=5)
    page.quote(_listed(start.argv), indent=5, label="program ")
    page.quote(_listed(start.environment) or "none", indent=5, label="environ ")
    pinned = sum(1 for layer in start.layers if not layer.delegation)
    page.say(f"layers: {len(start.layers)}, of which pinned by the signer: {pinned}", indent=5)
    for layer in start.layers:
        if layer.delegation:
            _delegated(page, layer)
        elif page.details:
            page.quote(layer.digest, indent=7, label=f"layer {layer.index} ")
    for said in start.attestation_data:
        _said_of_itself(page, said)


def _said_of_itself(page: _Page, said: AttestationDataFact) -> None:
    page.say(f"container {said.container_id} says of itself, which nobody checked:", indent=5)
    shown = said.data.decode() if said.kind == "text" else said.data.hex()
    page.quote(shown, indent=5, label=f"{said.kind:8}")


def _delegated(page: _Page, layer: LayerFact) -> None:
    page.say(f"Layer {layer.index} was LEFT TO SOMEONE ELSE by the signer:", indent=7)
    for hop in layer.delegation:
        version = "no version" if hop.svn is None else f"version {hop.svn}"
        page.quote(f"{hop.alias}, {version}", indent=7, label="is      ")
        page.quote(page.digest(hop.signer), indent=7, label="says    ")
        page.quote(page.digest(hop.reference), indent=7, label="for     ")
        page.quote(page.digest(hop.statement_digest_sha384), indent=7, label="stated  ")
    page.quote(page.digest(layer.digest), indent=7, label="digest  ")


def _lenders(page: _Page, facts: Facts) -> None:
    if not facts.layer_only_images:
        return
    page.heading("Images that run nothing and only lend layers")
    for number, image in enumerate(facts.layer_only_images, start=1):
        _image(page, number, image)


def _loading(page: _Page, facts: Facts) -> None:
    page.heading("Can more be loaded?")
    page.say(
        "No. Loading was ended for good; only a reboot, which this verdict does not cover, "
        "begins anew."
        if facts.sealed
        else "YES. Loading was not ended: further images can be admitted at any time."
    )
    for event in facts.unknown_events:
        weight = "and it matters" if event.critical else "it calls itself informative"
        page.say(
            f"Record {event.position} is of a kind that this verifier does not know; {weight}:"
        )
        page.quote(event.operation)


def _supervisors(page: _Page, facts: Facts) -> None:
    page.heading("What runs beneath the programs, with power over them")
    for supervisor in facts.supervisors:
        _supervisor(page, supervisor, restarted=supervisor is not facts.supervisors[0])
    if facts.unsafe_settings:
        page.say("Checks that the configuration TURNS OFF:")
        for setting in facts.unsafe_settings:
            page.quote(setting)
    else:
        page.say("The configuration turns no check off.")


def _supervisor(page: _Page, supervisor: SupervisorFact, *, restarted: bool) -> None:
    if restarted:
        page.say(f"Later (record {supervisor.position}) it became:")
    for component in supervisor.components:
        page.quote(
            f"{component.name} {component.version} ({component.distribution}), "
            f"digest {page.digest(component.digest_sha384)}",
            label=f"{component.role:11}",
        )
    page.quote(page.digest(supervisor.config_digest_sha384), label="config     ")


def _speaker(page: _Page, facts: Facts) -> None:
    page.heading("For whom this evidence speaks")
    if facts.speaker is None:
        page.say("For the trust domain as a whole. It vouches for no one who answers on a socket.")
        return
    page.say(f"For container {facts.speaker.container_id}, which asked through its own socket:")
    page.quote(page.digest(facts.speaker.image_id), label="image    ")
    if facts.public_key_sha384 is not None:
        page.quote(facts.public_key_sha384, label="its key  ")
    if facts.user_data is not None:
        page.quote(ascii(facts.user_data)[1:], label="its data ")


def _platform(page: _Page, facts: Facts) -> None:
    page.heading("The platform")
    if facts.tcb_status is not None:
        advisories = ", ".join(facts.advisory_ids) or "none"
        page.say(
            f"State of its security updates: {facts.tcb_status}; known weaknesses: {advisories}"
        )
    else:
        page.say("Nothing is known of it: the quote's signatures did not verify.")
    if facts.base is None:
        return
    page.quote(page.digest(facts.base.mr_td), label="firmware          ")
    what = ("firmware settings ", "loader and kernel ", "command line      ", "supervisor's log  ")
    for label, value in zip(what, facts.base.rtmrs, strict=True):
        page.quote(page.digest(value), label=label)


# --- checks ---------------------------------------------------------------------------------


def _checks(page: _Page, verdict: Verdict) -> None:
    page.heading("What was checked")
    for check in verdict.checks:
        _tree(page, check, indent=0)


def _tree(page: _Page, check: Check, *, indent: int) -> None:
    if not check.children:
        if page.details:
            _leaf(page, check, indent=indent)
        else:
            page.mark(check.outcome, page.digest(_said(check)), indent=indent)
        return
    leaves = list(check.leaves())
    passed = sum(1 for leaf in leaves if leaf.outcome is Outcome.PASS)
    title = page.digest(f"{check.title}: {passed} of {len(leaves)} passed")
    page.mark(check.outcome, title, indent=indent)
    for child in check.children:
        if page.details or child.outcome is not Outcome.PASS:
            _tree(page, child, indent=indent + 2)


def _said(leaf: Check) -> str:
    """A check's title says what must hold; where it does not, nobody may read that it does."""
    denial = "NOT SO: " if leaf.outcome is Outcome.FAIL else ""
    return f"{denial}{leaf.title} ({leaf.id})"


def _leaf(page: _Page, leaf: Check, *, indent: int) -> None:
    page.mark(leaf.outcome, page.digest(_said(leaf)), indent=indent)
    unmade = leaf.outcome is Outcome.NOT_CHECKED
    values = {
        "why not  " if unmade else "expected ": leaf.expected,
        "found    ": leaf.actual,
        "judge    ": leaf.anchor,
        "policy   ": leaf.policy_rule,
    }
    for label, value in values.items():
        if value is not None:
            page.quote(page.digest(value), indent=indent + 2, label=label)


def _beliefs(page: _Page, verdict: Verdict) -> None:
    believed = to_believe(verdict)
    if not believed:
        return
    page.heading("What remains to be believed, since nobody checked it")
    for leaf in believed:
        page.say(page.digest(f"- {leaf.title} ({leaf.id})"))


def _shortened(digits: re.Match[str]) -> str:
    return digits[0][:_SHORT_DIGITS] + "…"


def _listed(texts: Sequence[str] | Iterable[str]) -> str:
    # Quotes keep ["a b"] and ["a", "b"] apart.
    return " ".join(f"'{text}'" for text in texts)
