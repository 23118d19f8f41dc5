"""The one fault that only a command line has."""

from __future__ import annotations

from supervisor.formats.errors import Refusal


class UsageError(Refusal):
    """The person's input is wrong or cannot be read: exit code 2."""

    kind = "usage"
