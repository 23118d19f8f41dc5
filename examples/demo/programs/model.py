"""Inference: the risk of cardiovascular disease within ten years (Framingham, 2008).

D'Agostino et al., "General cardiovascular risk profile for use in primary care",
Circulation 117 (2008), table 2: risk = 1 - S0 ** exp(sum(weight * feature) - mean).
The weights are a file of this image, so they are measured like its code.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

from service import BadRequest, Json, as_object, call, interpreter, number, serve, setting

_WEIGHTS = Path(__file__).with_name("weights.json")


def score(weights: Json, sex: str, features: Json) -> float:
    """The risk, 0 to 1. Raises `BadRequest` for features other than the model's."""
    of_sex = weights.get(sex)
    if not isinstance(of_sex, dict):
        raise BadRequest(f"the model knows nothing about sex {sex!r}")
    if set(features) != set(of_sex["weights"]):
        raise BadRequest(f"features must be {', '.join(sorted(of_sex['weights']))}")
    total = sum(
        number(of_sex["weights"], name) * number(features, name) for name in sorted(features)
    )
    survival = number(of_sex, "baseline_survival")
    return float(1.0 - survival ** math.exp(total - number(of_sex, "mean")))


def main() -> int:
    audit = setting("AUDIT_URL")
    weights = as_object(_WEIGHTS.read_bytes())

    def answer(request: Json) -> Json:
        features = request.get("features")
        if not isinstance(features, dict):
            raise BadRequest("features must be an object")
        risk = round(score(weights, str(request.get("sex")), features), 4)
        entry = call(f"{audit}/entries", {"id": request.get("id"), "risk": risk})
        return {
            "id": request.get("id"),
            "ten_year_risk": risk,
            "audit": {name: entry[name] for name in ("number", "chain_sha384")},
            "interpreters": {"model": interpreter(), "audit": entry["interpreter"]},
        }

    return serve(
        "model",
        {("POST", "/score"): answer},
        address=(setting("LISTEN_ADDRESS"), int(setting("LISTEN_PORT"))),
        peers=(audit,),
    )


if __name__ == "__main__":
    sys.exit(main())
