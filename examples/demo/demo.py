"""The story that Attested Containers exists for, with real containers in a software TD.

    ./run demo [--out DIR]

Exit status 0 only if every scene came out as it should.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import traceback
from pathlib import Path

import attacks
import operating
from images import GATEWAY_PORT
from machine import Machine
from owners import CLINIC, DELEGATING, PROGRAMS, Owners
from registry import Registry
from relying_party import RECORD, Channel, RelyingParty, fresh_nonce
from stage import Argument, SceneFailed, Stage, indented, interruptible

# Says that a folder is an earlier demo's, and may be emptied for the next.
MARK = ".attested-containers-demo"


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="kept afterwards")
    parser.add_argument(
        "--cache", type=Path, default=Path(".demo-cache"), help="for downloaded packages"
    )
    args = parser.parse_args()
    out: Path = args.out.resolve()
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).is_file():
            parser.error(f"--out {out}: there is something in it that is not an earlier demo's")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()
    with (out / "transcript.txt").open("w") as transcript, interruptible():
        stage = Stage(out, transcript)
        try:
            perform(stage, args.cache.resolve())
            code = 0
        except KeyboardInterrupt:
            stage.say("\ninterrupted; cleaning up")
            code = 130
        except SceneFailed as error:
            stage.say(f"\nFAILED: {error}")
            code = 1
        except Exception:
            stage.say("\nFAILED:\n" + traceback.format_exc())
            code = 1
        finally:
            stage.close()
        if code == 0:
            stage.say()
            stage.say("Every scene came out as it should. Nothing is left running or mounted.")
            stage.say(f"Evidence, policy, verdicts and this transcript are in {out}")
    return code


def perform(stage: Stage, cache: Path) -> None:
    registry = Registry(stage)
    owners = Owners(stage, registry, cache)
    machine = Machine(stage, registry, owners.layouts)
    scene_owners(stage, owners)
    machine.power_on()
    relying_party = RelyingParty(stage, machine)
    scene_plan(stage, owners, machine)
    scene_rehearsal(stage, owners, machine, relying_party)
    machine.boot()
    scene_operator(stage, owners, machine)
    scene_verdict(stage, relying_party, machine, version=2)
    stage.scene("6. The operator looks after the containers, as far as their owners allow")
    operating.perform(stage, machine, relying_party)
    scene_update(stage, owners, machine, relying_party)
    stage.scene("9. Attacks: each is refused, or exposed by the verdict")
    attacks.perform(stage, owners, machine, relying_party)
    machine.halt()


def scene_owners(stage: Stage, owners: Owners) -> None:
    stage.scene("1. Two owners and a cloud provider (CSP) make and sign images")
    stage.say(
        "  building five OCI images from this distribution's packages, a minute the first time"
    )
    owners.make_keys()
    owners.build_images()
    owners.convert_and_sign()
    for name in PROGRAMS:
        left = "interpreter left to the CSP" if name in DELEGATING else "all layers pinned"
        stage.say(f"  {name:9} signed by {owners.owner_of(name):7} {left}")
    owners.vendor("python-2", 2, ["python:2"], show=True)
    stage.say("  the CSP signed its interpreter layer as python:2")
    for name in (*CLINIC, "python-2"):
        owners.publish(name, show=name == "gateway")
    stage.say("  the clinic and the CSP published theirs in a registry; the lab's are on a disk")


def scene_plan(stage: Stage, owners: Owners, machine: Machine) -> None:
    stage.scene("2. Before anything boots: what will the register hold?")
    machine.identity()
    arguments: list[Argument] = [
        "plan",
        owners.bundle("python-2"),
        *owners.all_bundles(),
        "--together",
    ]
    arguments += ["--identity", stage.out / "identity.json"]
    done = stage.acon(*arguments, "--json", show=True)
    (stage.out / "plan.json").write_text(done.out)


def scene_rehearsal(
    stage: Stage, owners: Owners, machine: Machine, relying_party: RelyingParty
) -> None:
    stage.scene("3. The relying party writes its policy, from a rehearsal that it compares")
    machine.boot()
    machine.load([owners.bundle("python-2"), *owners.all_bundles(), "--together"])
    stage.acon("seal")
    rehearsal = machine.evidence(fresh_nonce(), "rehearsal")
    for what in relying_party.write_policy(rehearsal, machine, owners):
        stage.say(f"  compared {what}")


def scene_operator(stage: Stage, owners: Owners, machine: Machine) -> None:
    stage.scene("4. The operator boots a TD, loads the images as a group, seals, starts")
    stage.say("  (each accepts the next one only: after the first, none could follow alone)")
    load: list[Argument] = [owners.published("python-2"), *owners.all_items(), "--together"]
    machine.load(load, show=True)
    stage.acon("seal", show=True)
    machine.start(PROGRAMS, show=True)
    stage.say(indented(stage.acon("ps", show=True).out))


def scene_verdict(
    stage: Stage, relying_party: RelyingParty, machine: Machine, *, version: int
) -> None:
    number, again = (5, "") if version == 2 else (8, ", with the same policy as before")
    stage.scene(
        f"{number}. The relying party verifies offline{again}, then sends a patient's record"
    )
    channel = Channel(GATEWAY_PORT)
    nonce = fresh_nonce()
    evidence = relying_party.evidence_over(channel, nonce, f"gateway-python-{version}")
    done = relying_party.verify(
        evidence, nonce, *relying_party.speaking(channel), expect=0, show=True
    )
    (stage.out / f"verdict-python-{version}.txt").write_text(done.out)
    stage.say(indented(done.out if version == 2 else _in_short(done.out)))
    status, body = channel.ask("POST", "/records", RECORD)
    channel.close()
    answer = json.loads(body)
    if status != 200 or "ten_year_risk" not in answer:
        raise SceneFailed(f"the record was answered with {status}: {answer}")
    stage.say(
        f"  the record went over the verified connection; ten-year risk {answer['ten_year_risk']}"
    )
    for program, build in sorted(answer["interpreters"].items()):
        mark, _, _ = build.partition(";")
        stage.say(f"    {program:9} runs {mark}")
        expected = f"python:{version}" if program in DELEGATING else "python:2"
        if expected not in build:
            raise SceneFailed(f"{program} was to run {expected}, and runs {build}")
    if version == 2:
        check_plan(stage, evidence)


def check_plan(stage: Stage, evidence: Path) -> None:
    """The register is what `acon plan` said before anything was booted."""
    found = operating.register(stage, evidence)
    planned = json.loads((stage.out / "plan.json").read_text())
    if found != planned["rtmr3"]:
        raise SceneFailed(f"planned {planned['rtmr3']}, but the log replays to {found}")
    stage.say(f"  RTMR[3] is what `acon plan` had said: {planned['rtmr3'][:32]}…")


def scene_update(
    stage: Stage, owners: Owners, machine: Machine, relying_party: RelyingParty
) -> None:
    stage.scene("7. The CSP updates the interpreter; the owners sign nothing")
    owners.vendor("python-3", 3, ["python:3", "python:2"], show=True)
    owners.publish("python-3", show=True)
    machine.boot()
    machine.load([owners.published("python-3"), *owners.all_items(), "--together"])
    stage.acon("seal")
    machine.start(PROGRAMS)
    scene_verdict(stage, relying_party, machine, version=3)


def _in_short(verdict: str) -> str:
    """The headline, and what was left to somebody: the rest is as before, and in a file."""
    lines = verdict.splitlines()
    left = [
        line for line in lines if "LEFT TO SOMEONE" in line or line.lstrip().startswith("| is ")
    ]
    return "\n".join([*lines[: lines.index("")], "[…]", *left])


if __name__ == "__main__":
    sys.exit(main())
