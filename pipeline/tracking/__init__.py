"""Logging to MLflow, and its model registry."""

# A point of the curves: milliseconds since 1970, step, values by curve.
Point = tuple[int, int, dict[str, float]]
