"""The operator's side of running containers: what their owners let a stranger do, and no more."""

from __future__ import annotations

import time
from pathlib import Path

from machine import Machine
from relying_party import RelyingParty, fresh_nonce
from stage import Argument, SceneFailed, Stage, indented

from acon.commands.invoke import ACON_FAILED

RESTARTED = "audit: goes on with a trail of 1 entries"
SAYS = "says of itself, which nobody checked:"
PATIENCE_S = 60


def perform(stage: Stage, machine: Machine, relying_party: RelyingParty) -> None:
    """The record of the scene before went through all five, so `audit` has one entry."""
    told = stage.acon("logs", "audit", show=True)
    stage.say(indented(told.out))
    before = stage.acon("invoke", "audit", "Count", show=True).out
    stage.say(indented(before))
    refused(stage, "signal", "audit", "KILL", code=1)
    refused(stage, "invoke", "audit", "forget", code=ACON_FAILED)
    stage.say(indented(stage.acon("restart", "audit", show=True).out))
    wait_for_restarted(stage)
    after = stage.acon("invoke", "audit", "Count", show=True).out
    stage.say(indented(after))
    entries, chain = after.split()
    if after != before or entries != "1":
        raise SceneFailed(f"a restart was to keep the trail {before!r}, and left {after!r}")
    stage.say("  the restarted container has what it wrote")
    nonce = fresh_nonce()
    evidence = machine.evidence(nonce, "after-restart", show=True)
    verdict = relying_party.verify(evidence, nonce, expect=0, show=True).out
    said = said_of_itself(verdict)
    stage.say(indented("\n".join([verdict.splitlines()[0], "[…]", *said])))
    if chain not in "".join(line.strip(" |") for line in said):
        raise SceneFailed(f"the verdict was to show the chain {chain}:\n{verdict}")
    before_restart = stage.out / "evidence" / "gateway-python-2.json"
    if register(stage, evidence) != register(stage, before_restart):
        raise SceneFailed("a restart was to say nothing to the log, and the register changed")
    stage.say("  the same policy accepts it: a restart is not in the log, RTMR[3] is what it was;")
    stage.say("  and it shows what `audit` says of its trail: the hash that Count printed")


def register(stage: Stage, evidence: Path) -> object:
    """What the log of this evidence replays to."""
    shown = stage.acon("log", "show", evidence, "--json").json()
    if not isinstance(shown, dict):
        raise SceneFailed("acon log show --json was to print an object")
    return shown["register"]


def refused(stage: Stage, *arguments: Argument, code: int) -> None:
    """A command that the manifest, or the image's owner by a name, does not allow."""
    done = stage.acon(*arguments, expect=code, show=True)
    stage.say(indented(done.said))


def wait_for_restarted(stage: Stage) -> None:
    """It runs at once; that it has read its trail, its log says."""
    deadline = time.monotonic() + PATIENCE_S
    while RESTARTED not in (told := stage.acon("logs", "audit").out):
        if time.monotonic() > deadline:
            raise SceneFailed(f"audit was to say {RESTARTED!r}, and said:\n{told}")
        time.sleep(0.1)


def said_of_itself(verdict: str) -> list[str]:
    """The lines of a verdict about containers' own words: a heading, and what is quoted."""
    found: list[str] = []
    quoting = False
    for line in verdict.splitlines():
        quoting = SAYS in line or (quoting and line.lstrip().startswith("|"))
        if quoting:
            found.append(line)
    return found
