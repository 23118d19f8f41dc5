"""Looks at each record before anybody computes with it."""

from __future__ import annotations

import sys

from service import BadRequest, Json, call, interpreter, number, serve, setting

# Field, least, greatest, unit: what the model was made for (ages), or what can be measured.
RANGES = (
    ("age", 30, 79, "years"),
    ("total_cholesterol", 80, 500, "mg/dl"),
    ("hdl_cholesterol", 10, 150, "mg/dl"),
    ("systolic_pressure", 70, 260, "mmHg"),
)
FLAGS = ("treated_for_pressure", "smoker", "diabetic")


def validate(record: Json) -> Json:
    """The record with exactly the fields that are known. Raises `BadRequest`."""
    known = {"id", "sex", *(name for name, *_ in RANGES), *FLAGS}
    unknown = sorted(set(record) - known)
    if unknown:
        raise BadRequest(f"unknown fields: {', '.join(unknown)}")
    identifier = record.get("id")
    if not isinstance(identifier, str) or not 1 <= len(identifier) <= 64:
        raise BadRequest("id must be a text of 1 to 64 characters")
    if record.get("sex") not in ("female", "male"):
        raise BadRequest(f"sex must be female or male (the model's two), got {record.get('sex')!r}")
    for name, least, greatest, unit in RANGES:
        if not least <= number(record, name) <= greatest:
            raise BadRequest(f"{name} must be {least} to {greatest} {unit}, got {record[name]}")
    for name in FLAGS:
        if not isinstance(record.get(name), bool):
            raise BadRequest(f"{name} must be true or false, got {record.get(name)!r}")
    return dict(record)


def main() -> int:
    features = setting("FEATURES_URL")

    def records(record: Json) -> Json:
        answer = call(f"{features}/features", validate(record))
        interpreters = answer.get("interpreters")
        if isinstance(interpreters, dict):
            interpreters["intake"] = interpreter()
        return answer

    return serve(
        "intake",
        {("POST", "/records"): records},
        address=(setting("LISTEN_ADDRESS"), int(setting("LISTEN_PORT"))),
        peers=(features,),
    )


if __name__ == "__main__":
    sys.exit(main())
