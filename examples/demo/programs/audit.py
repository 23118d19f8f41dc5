"""Remembers, in memory, that something was scored: never what was in the record."""

from __future__ import annotations

import hashlib
import json
import sys
import threading

from service import BadRequest, Json, interpreter, number, serve, setting


class Trail:
    """A chain of hashes over all entries, so that a number and a hash vouch for all before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._high_risk = 0
        self._chain = bytes(48)

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
            self._count += 1
            self._high_risk += risk >= 0.2
            self._chain = hashlib.sha384(self._chain + line.encode()).digest()
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


def main() -> int:
    trail = Trail()
    return serve(
        "audit",
        {("POST", "/entries"): trail.append, ("GET", "/summary"): trail.summary},
        address=(setting("LISTEN_ADDRESS"), int(setting("LISTEN_PORT"))),
    )


if __name__ == "__main__":
    sys.exit(main())
