"""What is logged to MLflow."""

RUN_FILE = "run.json"
"""Of a training's output: the id of its MLflow run, and its settings."""

# Of curves: milliseconds since 1970, step, values.
Point = tuple[int, int, dict[str, float]]
