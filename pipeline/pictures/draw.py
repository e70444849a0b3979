"""The only module that draws with matplotlib: sample grids, the process strip, schedules, the bound over t."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import matplotlib as mpl
import numpy as np
from PIL import Image, ImageDraw, ImageFont

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg

BORDER = 1
LEAST_TILE_PIXELS = 32
FONT_PIXELS, GAP = 12, 4


def grid(images: np.ndarray, columns: int) -> Image.Image:
    """Tiles images row by row, and enlarges small ones without smoothing.

    Args:
        images: uint8 [N, H, W, C], C = 1, 3 or 4.
        columns: images per row.
    """
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


def save_grid(
    images: np.ndarray,
    path: Path,
    columns: int = 0,
    row_names: Sequence[str] = (),
    column_names: Sequence[str] = (),
) -> None:
    """Writes a `grid` of images as PNG, with the names of its rows and columns beside it.

    Args:
        images: uint8 [N, H, W, C].
        columns: images per row; 0 = as square as possible.
        row_names: one for each row, or none.
        column_names: one for each column, or none.
    """
    picture = grid(images, columns or max(1, int(np.ceil(np.sqrt(len(images))))))
    _with_names(picture, list(row_names), list(column_names)).save(path)


def _with_names(picture: Image.Image, rows: list[str], columns: list[str]) -> Image.Image:
    """Adds names to the left of a grid's rows and above its columns. Wide column names are written upright."""
    font = ImageFont.load_default(FONT_PIXELS)
    widest = {
        "rows": max(map(font.getlength, rows), default=0),
        "columns": max(map(font.getlength, columns), default=0),
    }
    tile_w = picture.width // max(1, len(columns))
    upright = widest["columns"] > tile_w - 2 * GAP
    left = int(widest["rows"]) + 2 * GAP if rows else 0
    top = (int(widest["columns"]) + 2 * GAP if upright else FONT_PIXELS + 2 * GAP) if columns else 0
    canvas = Image.new(picture.mode, (picture.width + left, picture.height + top), "white")
    canvas.paste(picture, (left, top))
    pen = ImageDraw.Draw(canvas)
    for i, name in enumerate(rows):
        middle = top + (i + 0.5) * (picture.height - BORDER) / len(rows)
        pen.text((left - GAP, middle), name, "black", font, anchor="rm")
    for i, name in enumerate(columns):
        middle = left + (i + 0.5) * (picture.width - BORDER) / len(columns)
        if upright:
            strip = Image.new(picture.mode, (top, FONT_PIXELS + GAP), "white")
            ImageDraw.Draw(strip).text((GAP, strip.height / 2), name, "black", font, anchor="lm")
            canvas.paste(strip.rotate(90, expand=True), (int(middle - strip.height / 2), 0))
        else:
            pen.text((middle, top - GAP), name, "black", font, anchor="mb")
    return canvas


def file_of(save: Callable[[Path], object]) -> bytes:
    """The bytes of the file that `save` writes to its path, for storages without local paths."""
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
    """Draws the forward process q above the reverse process p_theta, one column for each chosen t.

    Args:
        forward, reverse: N images for each step, uint8 [N, H, W, C], in the order of the process.
        forward_steps, reverse_steps: t of each step as in Ho et al. 2020, where t = 0 is the data.
    """
    examples = len(forward[0])
    rows, columns = 2 * examples, max(len(forward), len(reverse))
    figure, axes = plt.subplots(rows, columns, figsize=(1.1 * columns, 1.1 * rows + 0.8), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
        axis.set(xticks=[], yticks=[])
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
                    axis.set_title(f"t = {step}", fontsize=8, y=1.0)
                if column == 0:
                    axis.text(-0.15, 0.5, f"${name}$", rotation=90, va="center", transform=axis.transAxes)
    _finish(figure, path)


def save_schedules(curves: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Draws alpha_bar and log SNR over t / T, side by side.

    Args:
        curves: alpha_bar and SNR of each schedule by name, float [T] each. The last curve is dashed, because it may
            coincide with another one.
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
    """Draws the terms L_{t-1} of the bound (Ho et al. 2020, equation 5) over t, both axes logarithmic.

    Args:
        terms: terms in bits/dim, float [N]; the first is L_0.
        steps: t of each term, from 1, int [N]; None = 1 to N.
    """
    figure, axis = plt.subplots(figsize=(6, 4))
    at = np.arange(1, len(terms) + 1) if steps is None else steps
    axis.loglog(at, np.maximum(terms, 1e-12), marker="." if len(at) < 100 else "")
    axis.set(xlabel="t", ylabel="bits/dim", title=r"terms of the bound, $L_{t-1}$")
    axis.grid(alpha=0.3)
    _finish(figure, path)


def save_nearest(
    samples: np.ndarray, nearest: np.ndarray, path: Path, columns: int, column_names: Sequence[str] = ()
) -> None:
    """Draws rows of samples, each above a row of their nearest training images.

    Args:
        samples, nearest: uint8 [N, H, W, C].
        columns: samples per row; samples of an incomplete last row are not shown.
        column_names: one for each column, or none.
    """
    pairs = [
        part
        for i in range(0, len(samples) - columns + 1, columns)
        for part in (samples[i : i + columns], nearest[i : i + columns])
    ]
    names = ["sample", "nearest"] * (len(pairs) // 2)
    save_grid(np.concatenate(pairs), path, columns, names, column_names)


def _finish(figure: plt.Figure, path: Path) -> None:
    figure.tight_layout(h_pad=0.2)
    figure.set_dpi(110)
    # savefig would draw everything twice after a layout. The file is the same.
    cast(FigureCanvasAgg, figure.canvas).print_png(path)
    plt.close(figure)
