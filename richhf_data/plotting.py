"""The small plots of HTML pages and workdirs: one look, without a background, legible on a light and a dark page."""

import io

import matplotlib.axes
import matplotlib.figure

from richhf_data import drawing

SCORE_COLORS = ("#d97400", "#5b86d6", "#3a9d6e", "#b0589f")  # of `schema.SCORES`
INK, NEUTRAL = "#7d8496", "#b9bfcc"  # of texts; of axes and lines to compare with


def panels(size: tuple[float, float], dpi: int, rows: int) -> tuple[matplotlib.figure.Figure, list[matplotlib.axes.Axes]]:
    """Empty plots, one above the other, with the x axis in common. size: width and height of all, in inches."""
    made = matplotlib.figure.Figure(size, dpi=dpi, layout="constrained")
    all_axes = list(made.subplots(rows, sharex=True, squeeze=False)[:, 0])
    for axes in all_axes:
        axes.patch.set_alpha(0)
        axes.tick_params(colors=INK, labelsize=7.5, length=2)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set_color(INK)
        for side, spine in axes.spines.items():
            spine.set(visible=side in ("bottom", "left"), color=NEUTRAL)
    return made, all_axes


def figure(size: tuple[float, float], dpi: int) -> tuple[matplotlib.figure.Figure, matplotlib.axes.Axes]:
    """An empty plot. size: width and height in inches."""
    made, (axes,) = panels(size, dpi, 1)
    return made, axes


def legend(axes: matplotlib.axes.Axes) -> None:
    """A line above the plot with the names of what is drawn."""
    style = {"fontsize": 7, "labelcolor": INK, "handlelength": 0.8, "handletextpad": 0.4, "columnspacing": 1.0}
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.17), ncols=4, frameon=False, **style)


def png(made: matplotlib.figure.Figure) -> bytes:
    """The plot as a PNG."""
    file = io.BytesIO()
    made.savefig(file, format="png", transparent=True)
    return file.getvalue()


def uri(made: matplotlib.figure.Figure) -> str:
    """The plot as a data URI of a PNG."""
    return drawing.data_uri("image/png", png(made))
