"""A run's curves as one picture, drawn from its metrics.jsonl."""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from megatron_nft.metrics import FILE_NAME, NON_FINITE, Record, read_metrics
from megatron_nft.panels import (
    BLUE,
    Panel,
    Series,
    held_out_sets,
    panels,
    phases,
)

INK, MUTED, GRID = "#1F2933", "#66727F", "#E6E9ED"
ALARM = "#B42318"

Floats = list[float]

SIZE_INCHES, DPI = (16.0, 10.0), 100
PANELS_PER_ROW = 4
LEGEND_COLUMNS = 3
TICK_STEPS = (1, 2, 2.5, 5, 10)
NUM_POINTS_MARKED = 40  # up to here each point is marked; a single one shows
NUM_POINTS_SMOOTHED = 80  # from here on the moving mean is drawn over the raw points


def draw(run_dir: Path, out: Path | None = None, title: str = "") -> Path:
    """Draw a run's curves as a PNG of 1600 × 1000 pixels; the run may still be going on.

    `out` defaults to report.png in the run directory, `title` to the directory's name.
    Raises ValueError where there is nothing to draw (yet).
    """
    if not (run_dir / FILE_NAME).exists():
        raise ValueError(f"{run_dir} has no {FILE_NAME}: is it a run directory?")
    records = read_metrics(run_dir)
    shown = panels(records)
    if not shown:
        raise ValueError(f"{run_dir / FILE_NAME} has no values to draw yet")

    layout = ConstrainedLayoutEngine(
        rect=(0.008, 0.008, 0.984, 0.91), w_pad=0.06, h_pad=0.07, wspace=0.02, hspace=0.02
    )
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout=layout, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    _head(figure, title or run_dir.resolve().name, records)
    last_step = max(record["step"] for record in records)
    for axes, panel in _place(figure, shown):
        DRAWINGS[panel.kind](axes, panel, records)
        _dress(axes, panel, last_step)
    out = out or run_dir / "report.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    canvas.print_png(out)
    return out


def _values(records: Sequence[Record], key: str, scale: float = 1.0) -> tuple[Floats, Floats]:
    """The steps at which a key has a value, and those values."""
    points = [(r["step"], r[key] * scale) for r in records if r.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: Floats, num_rollouts: int) -> Floats:
    """Of many values the centred moving mean: whole rollouts, about a fortieth of the run.

    Whole rollouts, because within each the policy moves away from the one that sampled.
    """
    if len(values) < NUM_POINTS_SMOOTHED:
        return values
    per_rollout = max(1, round(len(values) / max(1, num_rollouts)))
    width = min(len(values), per_rollout * max(1, round(len(values) / 40 / per_rollout)))
    sums = [0.0, *accumulate(values)]
    starts = (min(max(0, i - width // 2), len(values) - width) for i in range(len(values)))
    return [(sums[start + width] - sums[start]) / width for start in starts]


def _curve(axes: Axes, x: Floats, y: Floats, series: Series, num_rollouts: int) -> Floats:
    """Draw a line and return it; of many points, the moving mean over the pale raw line."""
    smooth = _smooth(y, num_rollouts)
    if smooth is not y:
        axes.plot(x, y, color=series.color, linewidth=0.8, alpha=0.25)
    axes.plot(
        x,
        smooth,
        color=series.color,
        linewidth=1.8,
        label=series.label,
        marker=_marker(y),
        markersize=3.5,
    )
    return smooth


def _marker(values: Floats) -> str:
    return "o" if len(values) <= NUM_POINTS_MARKED else ""


def _draw_lines(axes: Axes, panel: Panel, records: Sequence[Record]) -> None:
    for series in panel.series:
        _curve(axes, *_values(records, series.key, panel.scale), series, _num_rollouts(records))
    if not panel.log:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.04)
    if len(panel.series) > 1:
        _legend(axes)


def _draw_band(axes: Axes, panel: Panel, records: Sequence[Record]) -> None:
    """Quantiles, lowest to highest: a band between the outer ones, lines for all."""
    lines = [_values(records, series.key, panel.scale) for series in panel.series]
    (x, low), (x_high, high) = lines[0], lines[-1]
    if len(lines) > 1 and x == x_high:
        axes.fill_between(x, low, high, color=BLUE, alpha=0.15, linewidth=0)
    for series, (x, y) in zip(panel.series, lines, strict=True):
        smooth, marker = _smooth(y, _num_rollouts(records)), _marker(y)
        axes.plot(x, smooth, color=series.color, label=series.label, marker=marker, markersize=3.5)
    _legend(axes)


def _draw_accuracy(axes: Axes, panel: Panel, records: Sequence[Record]) -> None:
    """Training accuracy as a curve, held-out sets as points; both named at their right end."""
    ends = []
    for series in panel.series:
        x, y = _values(records, series.key, panel.scale)
        if series.key == "accuracy_all":
            y = _curve(axes, x, y, series, _num_rollouts(records))
        else:
            axes.plot(x, y, color=series.color, linewidth=2.0, marker="o", markersize=4.5)
        ends.append((x[-1], y[-1], series))
    low, high = axes.get_ylim()
    heights = _apart([y for _, y, _ in ends], gap=(high - low) * 0.07)
    right = max(x for x, _, _ in ends)
    for height, (_, y, series) in zip(heights, ends, strict=True):
        axes.annotate(
            f"{series.label} {y:.1f}",
            (right, height),
            xytext=(9, 0),
            textcoords="offset points",
            color=series.color,
            fontsize=9.5,
            fontweight="bold",
            va="center",
            bbox={"color": "white", "pad": 1},  # over the grid
        )
    axes.set_ylim(min(low, *heights), max(high, *heights))


def _draw_stack(axes: Axes, panel: Panel, records: Sequence[Record]) -> None:
    """One bar a rollout, of its phases, as wide as its steps."""
    rollouts = _by_rollout(records, [series.key for series in panel.series])
    steps = [step for step, _ in rollouts]
    gaps = [max(1.0, b - a) for a, b in pairwise([0, *steps])]
    few = len(steps) <= 60
    base = [0.0] * len(steps)
    for series in panel.series:
        heights = [seconds.get(series.key, 0.0) for _, seconds in rollouts]
        axes.bar(
            [step - gap / 2 for step, gap in zip(steps, gaps, strict=True)],
            heights,
            [gap * (0.86 if few else 1.0) for gap in gaps],
            bottom=base,
            color=series.color,
            label=series.label,
            antialiased=few,  # else hairlines show between the bars
        )
        base = [b + h for b, h in zip(base, heights, strict=True)]
    _legend(axes)


DRAWINGS: dict[str, Callable[[Axes, Panel, Sequence[Record]], None]] = {
    "lines": _draw_lines,
    "band": _draw_band,
    "accuracy": _draw_accuracy,
    "stack": _draw_stack,
}


def _by_rollout(
    records: Sequence[Record], keys: Sequence[str]
) -> list[tuple[float, dict[str, float]]]:
    """Each rollout's last step and its sums over the steps; those without any are left out."""
    sums: dict[float, tuple[float, dict[str, float]]] = {}
    for record in records:
        if (rollout := record.get("rollout")) is not None:
            _, total = sums.get(rollout, (0, {}))
            here = {k: total.get(k, 0.0) + record[k] for k in keys if record.get(k) is not None}
            sums[rollout] = (record["step"], total | here)
    return [(step, total) for step, total in sums.values() if total]


def _num_rollouts(records: Sequence[Record]) -> int:
    return len({r["rollout"] for r in records if r.get("rollout")})  # 0 is before the first


def _apart(values: Floats, gap: float) -> Floats:
    """Heights close to the values, in the same order, about `gap` or more from each other."""
    order = sorted(range(len(values)), key=values.__getitem__)
    placed = list(values)
    for _ in range(100):  # relax: each pair that is too close gives way by half
        for below, above in pairwise(order):
            lack = max(0.0, gap - (placed[above] - placed[below]))
            placed[below] -= lack / 2
            placed[above] += lack / 2
    return placed


def _place(figure: Figure, shown: Sequence[Panel]) -> list[tuple[Axes, Panel]]:
    """Axes for each panel, row by row; every row fills the width."""
    rows: list[list[Panel]] = [[]]
    for panel in shown:
        if sum(p.span for p in rows[-1]) + panel.span > PANELS_PER_ROW:
            rows.append([])
        rows[-1].append(panel)
    columns = math.lcm(*range(1, PANELS_PER_ROW + 1))
    grid = figure.add_gridspec(len(rows), columns)
    placed = []
    for i, row in enumerate(rows):
        unit, start = columns // sum(p.span for p in row), 0
        for panel in row:
            axes = figure.add_subplot(grid[i, start : start + panel.span * unit])
            start += panel.span * unit
            placed.append((axes, panel))
            if i == len(rows) - 1:
                axes.set_xlabel("optimizer step", fontsize=9.5, color=MUTED)
    return placed


def _dress(axes: Axes, panel: Panel, last_step: float) -> None:
    """What all panels share: title, unit, grid and range."""
    axes.set_title(panel.title, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=8)
    axes.set_ylabel(panel.unit, fontsize=9.5, color=MUTED)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)
    right = 1.19 if panel.kind == "accuracy" else 1.01  # room for the names of the lines
    axes.set_xlim(-0.01 * last_step, max(1.0, last_step) * right)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    log = panel.log and axes.dataLim.y1 > 0
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=TICK_STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.6g}"))
    if axes.get_legend():
        low, high = axes.get_ylim()
        room = 0.35 if len(panel.series) > LEGEND_COLUMNS else 0.2
        axes.set_ylim(low, high * (high / low) ** room if log else high + room * (high - low))


def _legend(axes: Axes) -> None:
    """Names in rows at the top, where `_dress` makes room for them."""
    axes.legend(
        loc="upper left",
        ncols=LEGEND_COLUMNS,
        fontsize=8.5,
        labelcolor=INK,
        frameon=False,
        handlelength=1.1,
        handletextpad=0.5,
        columnspacing=1.0,
        borderaxespad=0.1,
    )


def _head(figure: Figure, title: str, records: Sequence[Record]) -> None:
    """The title with what was gained, and under it what it took."""
    top = "  ·  ".join(filter(None, (title, headline(records))))
    figure.text(0.012, 0.963, top, fontsize=17, fontweight="bold", color=INK)
    figure.text(0.012, 0.935, _facts(records), fontsize=10.5, color=MUTED)
    if num_bad := sum(record.get(NON_FINITE) or 0 for record in records):
        figure.text(
            0.988,
            0.963,
            f"{num_bad:,} NaN or infinite",
            fontsize=12,
            color=ALARM,
            ha="right",
            fontweight="bold",
        )


def headline(records: Sequence[Record]) -> str:
    """Accuracy before → after: the mean over the held-out sets, else of the training answers."""
    sets = held_out_sets(dict.fromkeys(key for record in records for key in record))
    curves = [y for _, y in (_values(records, key, 100) for key in sets) if y]
    what = "held-out accuracy"
    if not curves:
        what = "training accuracy"
        curves = [y for y in [_values(records, "accuracy_all", 100)[1]] if y]
    if not curves:
        return ""
    last = sum(curve[-1] for curve in curves) / len(curves)
    of = f", mean of {len(curves)} sets" if len(curves) > 1 else ""
    if all(len(curve) == 1 for curve in curves):
        return f"{what} {last:.1f} %{of}"
    first = sum(curve[0] for curve in curves) / len(curves)
    return f"{what} {first:.1f} % → {last:.1f} %{of}"


def _facts(records: Sequence[Record]) -> str:
    """Steps, rollouts, hours and memory, as far as the run logged them."""
    num_rollouts = _num_rollouts(records)
    num_steps = max(record["step"] for record in records)
    keys = phases({key for record in records for key in record})
    hours = sum(sum(_values(records, key)[1]) for key in keys) / 3600
    memory = _values(records, "peak_memory_gib")[1]
    facts = [_count(num_steps, "step")]
    facts += [_count(num_rollouts, "rollout")] if num_rollouts else []
    facts += [f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"] if hours else []
    facts += [f"peak memory {max(memory):.1f} GiB"] if memory else []
    facts += ["bold lines: moving mean"] if len(records) > NUM_POINTS_SMOOTHED else []
    return "   ·   ".join(facts)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
