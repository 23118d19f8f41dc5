"""Turns a record into the numbers that the model was fitted to."""

from __future__ import annotations

import math
import sys

from service import Json, call, interpreter, number, serve, setting


def features(record: Json) -> Json:
    """Natural logarithms of the measured values; 0 or 1 for the rest (see weights.json)."""
    log_pressure = math.log(number(record, "systolic_pressure"))
    treated = record["treated_for_pressure"] is True
    return {
        "log_age": math.log(number(record, "age")),
        "log_total_cholesterol": math.log(number(record, "total_cholesterol")),
        "log_hdl_cholesterol": math.log(number(record, "hdl_cholesterol")),
        "log_pressure_untreated": 0.0 if treated else log_pressure,
        "log_pressure_treated": log_pressure if treated else 0.0,
        "smoker": 1.0 if record["smoker"] is True else 0.0,
        "diabetic": 1.0 if record["diabetic"] is True else 0.0,
    }


def main() -> int:
    model = setting("MODEL_URL")

    def compute(record: Json) -> Json:
        answer = call(
            f"{model}/score",
            {"id": record["id"], "sex": record["sex"], "features": features(record)},
        )
        interpreters = answer.get("interpreters")
        if isinstance(interpreters, dict):
            interpreters["features"] = interpreter()
        return answer

    return serve(
        "features",
        {("POST", "/features"): compute},
        address=(setting("LISTEN_ADDRESS"), int(setting("LISTEN_PORT"))),
        peers=(model,),
    )


if __name__ == "__main__":
    sys.exit(main())
