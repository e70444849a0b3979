"""What is logged to MLflow."""

# Of curves: milliseconds since 1970, step, values.
Point = tuple[int, int, dict[str, float]]
