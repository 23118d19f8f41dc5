"""Remembers that something was scored: never what was in the record."""

from __future__ import annotations

import hashlib
import http.client
import json
import sys
import threading
from pathlib import Path

import acon_inside
from service import BadRequest, Json, interpreter, number, serve, setting


class Trail:
    """A chain of hashes over all entries, so that a number and a hash vouch for all before.

    In a file of the container's own memory, a line `CHAIN RISK` for each entry: it outlasts a
    restart, and nothing else. Evidence that anybody asks for says how long the trail is and
    which hash it ends with.
    """

    def __init__(self, file: Path, container_socket: str) -> None:
        self._lock = threading.Lock()
        self._file = file
        self._socket = container_socket
        self._count = 0
        self._high_risk = 0
        self._chain = bytes(48)
        file.touch()
        for line in file.read_text().splitlines():
            chain, risk = line.split()
            self._add(bytes.fromhex(chain), float(risk))
        self._say()
        if self._count:
            _tell(f"goes on with a trail of {self._count} entries")

    def append(self, entry: Json) -> Json:
        """Add `{"id", "risk"}`; returns its number and the chain's new hash."""
        identifier, risk = entry.get("id"), number(entry, "risk")
        if not isinstance(identifier, str) or not 0 <= risk <= 1:
            raise BadRequest("an entry has an id and a risk from 0 to 1")
        # The id is a person's: only its hash stays here.
        line = json.dumps(
            {"id_sha384": hashlib.sha384(identifier.encode()).hexdigest(), "risk": risk},
            sort_keys=True,
        )
        with self._lock:
            chain = hashlib.sha384(self._chain + line.encode()).digest()
            with self._file.open("a") as file:
                file.write(f"{chain.hex()} {risk}\n")
            self._add(chain, risk)
            self._say()
            _tell(f"entry {self._count}")
            return {
                "number": self._count,
                "chain_sha384": self._chain.hex(),
                "interpreter": interpreter(),
            }

    def summary(self, _query: Json) -> Json:
        """Counts so far."""
        with self._lock:
            return {
                "entries": self._count,
                "high_risk": self._high_risk,
                "chain_sha384": self._chain.hex(),
            }

    def _add(self, chain: bytes, risk: float) -> None:
        self._chain = chain
        self._count += 1
        self._high_risk += risk >= 0.2

    def _say(self) -> None:
        words = f"trail of {self._count} entries, which ends with {self._chain.hex()}"
        try:
            acon_inside.say(words, path=self._socket)
        except (acon_inside.Refused, OSError, http.client.HTTPException) as error:
            _tell(f"the supervisor does not take our word: {error}")


def _tell(words: str) -> None:
    """The operator may read this (`logFDs`)."""
    sys.stdout.write(f"audit: {words}\n")
    sys.stdout.flush()


def main() -> int:
    trail = Trail(Path(setting("TRAIL_FILE")), setting("CONTAINER_SOCKET"))
    return serve(
        "audit",
        {("POST", "/entries"): trail.append, ("GET", "/summary"): trail.summary},
        address=(setting("LISTEN_ADDRESS"), int(setting("LISTEN_PORT"))),
    )


if __name__ == "__main__":
    sys.exit(main())
