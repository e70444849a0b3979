"""The only module that draws: sample grids, the process strip, schedules, the bound over t, what a search found."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from PIL import Image

mpl.use("Agg")
import matplotlib.pyplot as plt

BORDER = 1
LEAST_TILE_PIXELS = 32
LIGHT = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5}  # behind a label that lines cross
# Trials that a legend names; of more, the best.
NAMED = 16


def grid(images: np.ndarray, columns: int) -> Image.Image:
    """Tiles images, uint8 [N, H, W, C], row by row; small ones are enlarged without smoothing."""
    count, height, width, channels = images.shape
    factor = max(1, -(-LEAST_TILE_PIXELS // max(height, width)))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    tile_h, tile_w = height * factor + BORDER, width * factor + BORDER
    rows = -(-count // columns)
    canvas = np.full((rows * tile_h + BORDER, columns * tile_w + BORDER, channels), 128, np.uint8)
    for i, image in enumerate(images):
        y, x = BORDER + i // columns * tile_h, BORDER + i % columns * tile_w
        canvas[y : y + height * factor, x : x + width * factor] = image
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def save_grid(images: np.ndarray, path: Path, columns: int = 0) -> None:
    """Writes `grid` as PNG; as square as it can be where `columns` is 0."""
    grid(images, columns or max(1, int(np.ceil(np.sqrt(len(images)))))).save(path)


def file_of(save: Callable[[Path], object]) -> bytes:
    """The PNG file that one of these functions writes, for storages that have no paths."""
    with tempfile.TemporaryDirectory() as folder:
        save(path := Path(folder) / "picture.png")
        return path.read_bytes()


def save_process_strip(
    forward: Sequence[np.ndarray],
    forward_steps: Sequence[int],
    reverse: Sequence[np.ndarray],
    reverse_steps: Sequence[int],
    path: Path,
) -> None:
    """The forward process q above the reverse process p_theta, one column a chosen t.

    Args:
        forward, reverse: uint8 [N, H, W, C] each, N images at each of the steps, in the order of time.
        forward_steps, reverse_steps: the paper's t of each (0 = data).
    """
    examples = len(forward[0])
    rows, columns = 2 * examples, max(len(forward), len(reverse))
    figure, axes = plt.subplots(rows, columns, figsize=(1.1 * columns, 1.1 * rows + 0.8), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    halves = (
        (0, forward, forward_steps, "q(x_t | x_0)"),
        (examples, reverse, reverse_steps, "p(x_{t-1} | x_t)"),
    )
    for top, frames, steps, name in halves:
        for column, (frame, step) in enumerate(zip(frames, steps, strict=True)):
            for row in range(examples):
                axis = axes[top + row][column]
                axis.imshow(frame[row].squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                if row == 0:
                    axis.set_title(f"t = {step}", fontsize=8)
                if column == 0:
                    axis.text(-0.15, 0.5, f"${name}$", rotation=90, va="center", transform=axis.transAxes)
    _finish(figure, path)


def save_schedules(curves: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """alpha_bar and log SNR over t / T, side by side; `curves` maps a name to (alpha_bar, snr), each [T].

    The last curve is dashed: it may lie on another.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for name, (alpha_bar, snr) in curves.items():
        time = (np.arange(len(alpha_bar)) + 1) / len(alpha_bar)
        style = {"color": "black", "linestyle": "--"} if name == list(curves)[-1] else {}
        left.plot(time, alpha_bar, label=name, **style)
        right.plot(time, np.log10(snr), label=name, **style)
    left.set(xlabel="t / T", ylabel=r"$\bar\alpha_t$", title="signal kept")
    right.set(xlabel="t / T", ylabel=r"$\log_{10}$ SNR", title="signal-to-noise ratio")
    left.legend()
    _finish(figure, path)


def save_bound_terms(terms: np.ndarray, path: Path, steps: np.ndarray | None = None) -> None:
    """L_{t-1} in bits/dim over t, both axes logarithmic.

    Args:
        terms: [N], the first being L_0.
        steps: the paper's t of each; None = 1 to N.
    """
    figure, axis = plt.subplots(figsize=(6, 4))
    at = np.arange(1, len(terms) + 1) if steps is None else steps
    axis.loglog(at, np.maximum(terms, 1e-12), marker="." if len(at) < 100 else "")
    axis.set(xlabel="t", ylabel="bits/dim", title=r"terms of the bound, $L_{t-1}$")
    axis.grid(alpha=0.3)
    _finish(figure, path)


def save_nearest(samples: np.ndarray, nearest: np.ndarray, path: Path) -> None:
    """Samples (upper of each pair of rows) above their nearest training images; both uint8 [N, H, W, C]."""
    columns = min(len(samples), 16)
    pairs = [
        part
        for i in range(0, len(samples) - columns + 1, columns)
        for part in (samples[i : i + columns], nearest[i : i + columns])
    ]
    save_grid(np.concatenate(pairs), path, columns)


def save_parallel_coordinates(columns: dict[str, list[Any]], path: Path) -> None:
    """One line a trial through an axis for each setting; the last column is the objective.

    Args:
        columns: name -> one value a trial, best trial first; what isn't a number gets a place of its own.
    """
    count, trials = len(columns), len(next(iter(columns.values())))
    figure, axis = plt.subplots(figsize=(max(7, 1.5 * count), 4.8))
    heights = []
    for place, (name, values) in enumerate(columns.items()):
        here, ticks = _places(values)
        heights.append(here)
        axis.axvline(place, color="0.8", lw=1, zorder=0)
        for height, label in ticks:
            axis.annotate(
                label,
                (place, height),
                (4, 2),
                textcoords="offset points",
                fontsize=7,
                color="0.35",
                zorder=3,
                bbox=LIGHT,
            )
        axis.text(place, 1.07, name, ha="center", fontsize=9)
    for rank in reversed(range(trials)):
        line = [here[rank] for here in heights]
        axis.plot(range(count), line, color=_rank_colour(rank, trials), lw=_width(rank), alpha=0.9)
    axis.set(xlim=(-0.3, count - 0.3), ylim=(-0.05, 1.15))
    axis.axis("off")
    _finish(figure, path)


def _places(values: list[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Heights in 0..1, and where the axis is labelled."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        low, high = min(values), max(values)
        log = low > 0 and high / low > 5
        scaled = np.log(values) if log else np.array(values, float)
        span = scaled.max() - scaled.min() or 1.0
        heights = ((scaled - scaled.min()) / span).tolist()
        return heights, [(0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")] if high > low else [(0.0, f"{low:.4g}")]
    names = sorted({str(value) for value in values})
    places = {name: i / max(len(names) - 1, 1) for i, name in enumerate(names)}
    return [places[str(value)] for value in values], [(height, name) for name, height in places.items()]


def save_objective(
    curves: dict[str, tuple[list[int], list[float], list[float]]], metric: str, path: Path
) -> None:
    """The objective over images seen; `curves` maps a trial to (images, values, standard errors), best first."""
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for rank, (name, (images, values, errors)) in reversed(list(enumerate(curves.items()))):
        named = rank < NAMED
        axis.errorbar(
            images,
            values,
            errors if named else None,
            color=_rank_colour(rank, len(curves)),
            marker="o" if named else ".",
            ms=4,
            lw=_width(rank),
            capsize=2,
            label=name if named else None,
        )
    axis.set(xscale="log", xlabel="images seen in training", ylabel=metric)
    _rank_legend(axis, len(curves))
    _finish(figure, path)


def save_ranked_schedules(curves: dict[str, np.ndarray], path: Path) -> None:
    """alpha_bar over t / T, coloured by rank; `curves` maps a trial to alpha_bar, [T] each, best first."""
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for rank, (name, alpha_bar) in reversed(list(enumerate(curves.items()))):
        time = (np.arange(len(alpha_bar)) + 1) / len(alpha_bar)
        colour, label = _rank_colour(rank, len(curves)), name if rank < NAMED else None
        axis.plot(time, alpha_bar, color=colour, lw=_width(rank), label=label)
    axis.set(xlabel="t / T", ylabel=r"$\bar\alpha_t$")
    _rank_legend(axis, len(curves))
    _finish(figure, path)


def save_pareto(points: dict[str, tuple[float, float, bool]], names: tuple[str, str], path: Path) -> None:
    """Trials by two objectives, both minimised; `points` maps a trial to (x, y, on the front)."""
    figure, axis = plt.subplots(figsize=(6, 4.5))
    for name, (x, y, front) in sorted(points.items(), key=lambda item: item[1][2]):
        axis.plot(x, y, "o", ms=4, color="C0" if front else "0.8")
        if front or len(points) <= NAMED:
            axis.annotate(name, (x, y), (4, 4), textcoords="offset points", fontsize=7)
    front_points = sorted((x, y) for x, y, front in points.values() if front)
    axis.step([x for x, _ in front_points], [y for _, y in front_points], where="post", color="C0", lw=1)
    axis.set(xlabel=names[0], ylabel=names[1])
    _finish(figure, path)


def save_side_by_side(grids: dict[str, np.ndarray], path: Path) -> None:
    """Grids of images under their titles; `grids` maps a title to uint8 [N, H, W, C]."""
    figure, axes = plt.subplots(1, len(grids), figsize=(3.2 * len(grids), 3.5), squeeze=False)
    for axis, (name, images) in zip(axes[0], grids.items(), strict=True):
        axis.imshow(grid(images, int(np.ceil(np.sqrt(len(images))))), cmap="gray", vmin=0, vmax=255)
        axis.set_title(name, fontsize=9)
        axis.axis("off")
    _finish(figure, path)


def _rank_legend(axis: plt.Axes, count: int) -> None:
    """The best trials by name, the winner first; lines were drawn from the worst to the best."""
    handles, labels = axis.get_legend_handles_labels()
    title = f"the best {NAMED} of {count}" if count > NAMED else None
    style: dict[str, Any] = {
        "fontsize": 7,
        "title_fontsize": 7,
        "loc": "center left",
        "bbox_to_anchor": (1, 0.5),
    }
    axis.legend(handles[::-1], labels[::-1], title=title, **style)


def _width(rank: int) -> float:
    return 2.5 if rank == 0 else 1.2 if rank < NAMED else 0.5


def _rank_colour(rank: int, count: int) -> Any:
    """Dark for the best, light for the worst."""
    return plt.get_cmap("viridis")(0.95 * rank / max(count - 1, 1))


def _finish(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout(h_pad=0.2)
    figure.savefig(path, dpi=110)
    plt.close(figure)
