"""The picture of a plan: its nodes, what every row reads, and what it is stable for or draws; and
of several plans: their nodes and steps, one below the other."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ._plan import Coefficient, Plan, Row

__all__ = ["draw"]

#: Of orders 0 (none is declared), 1, 2, ...: Okabe and Ito's, told apart by every kind of colour
#: vision. A row's order is also written beside it.
_COLOURS = ("#888888", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#000000")
_MARKS = ("o", "s", "D", "^", "v", "P")
_WIDTH, _DPI = 14.0, 120
#: Inches of a state, of the panels below, and of everything at most.
_STATE, _BELOW, _TALLEST = 0.29, 4.4, 15.0
#: Width of a cell; numbers are written into cells at least so wide.
_CELL, _WRITTEN = 0.5, 0.41


def draw(plan: Plan, target: str | os.PathLike[str], *others: Plan) -> None:
    """Write the picture of a plan; with others, of the nodes and steps of all of them."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot needs matplotlib: pip install "fewstep[plot]".') from error
    for one in (plan, *others):
        one._of_one("plot")
    figure = _several(Figure, (plan, *others)) if others else _alone(Figure, plan)
    figure.savefig(os.fspath(target), dpi=_DPI)


def _alone(new: Callable[..., Any], plan: Plan) -> Any:
    states, regions, said = len(plan.levels), None, ""
    if not plan.stochastic:
        try:
            regions = plan.stability()
        except ValueError as error:  # it says that there is no step to look at
            said = f"Stability: {error}".replace("; ", ";\n")
    below = 0.8 if said else _BELOW
    table = min(max(2.4, _STATE * states), _TALLEST - below - 1.8)
    figure = new(figsize=(_WIDTH, table + below + 1.8), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08, w_pad=0.04, hspace=0.03, wspace=0.02)
    top, bottom = figure.subfigures(2, 1, height_ratios=(table + 1.5, below))
    left, right = _state_columns(plan), [j for j, call in enumerate(plan.calls) if call is not None]
    constant = any(row.shifts for row in plan.rows)
    wide = [min(max(_CELL * (len(left[0]) + constant), 0.9), 3.0)]
    wide.append(min(max(_CELL * len(right), 1.5), 6.2 - wide[0]))
    numbers = 0.6 * len(_numbers(plan))
    grid = top.add_gridspec(1, 4, width_ratios=(_WIDTH - sum(wide) - numbers, numbers, *wide))
    nodes = top.add_subplot(grid[0])
    size = min(8.0, 0.72 * 72 * table / states)
    _nodes(nodes, plan, size)
    _written(top.add_subplot(grid[1], sharey=nodes), plan, size)
    axes = [top.add_subplot(grid[i], sharey=nodes) for i in (2, 3)]
    _cells(axes[0], plan, *left, size, wide[0], constant)
    symbol = "N" if plan.raw else "D"
    what = "network outputs" if plan.raw else "data predictions"
    read = {k: {j: j for j in right} for k in range(states)}
    _cells(axes[1], plan, right, read, [f"{symbol}{j}" for j in right], size, wide[1], data=True)
    axes[0].set_title("states read", fontsize=9)
    signs = " (blue +, red -)" if wide[1] > 2.5 else "\n(blue +, red -)"
    axes[1].set_title(f"{what} read{signs}", fontsize=9)
    figure.suptitle(_title(plan), fontsize=12)
    if said:
        bottom.text(0.5, 0.5, said, ha="center", va="center", fontsize=10, color="0.3")
        return figure
    pair = bottom.subplots(1, 2, width_ratios=(3, 2))
    if regions is None:
        _drawn(pair, plan)
    else:
        regions.plot(pair)
    return figure


def _title(plan: Plan) -> str:
    about = plan.about
    where = [about[k] for k in ("process",) if k in about]
    where += [f"{about['grid']} grid"] if "grid" in about else []
    text = f"{about.get('solver', 'plan')}: {plan.nfe} NFE"
    return f"{text}, {', '.join(where)}" if where else text


# -- nodes -----------------------------------------------------------------------------------------


def _places(plans: Sequence[Plan]) -> tuple[Callable[[float], float], list[float]]:
    """Where a lambda is drawn, and the finite ones: infinite ones stand beside the others."""
    all_levels = [level for plan in plans for level in (*plan.levels, *plan.evaluations)]
    finite = sorted({float(v.lam) for v in all_levels if math.isfinite(float(v.lam))}) or [0.0]
    reach = 0.09 * ((finite[-1] - finite[0]) or 1.0)

    def place(lam: float) -> float:
        lam = float(lam)
        if math.isfinite(lam):
            return lam
        return finite[-1] + reach if lam > 0 else finite[0] - reach

    return place, finite


def _axis(ax: Any, plans: Sequence[Plan], fraction: float, note: str = "") -> Any:
    """The lambda axis in the direction of the run, with sigma and t of nodes of the first plan
    above it, as many as there is room for."""
    from matplotlib.ticker import MaxNLocator

    place, finite = _places(plans)
    levels = plans[0].levels
    ticks = [float(v) for v in MaxNLocator(7).tick_values(finite[0], finite[-1])]
    ticks = [v for v in ticks if finite[0] <= v <= finite[-1]] or [finite[0]]
    infinite = {float(v.lam) for p in plans for v in p.levels if not math.isfinite(float(v.lam))}
    low, high = place(-math.inf), place(math.inf)
    for lam in infinite:
        # A tick that the sign of infinity would lie on gives way.
        ticks = [v for v in ticks if abs(v - place(lam)) > 0.05 * (high - low)]
    names = [f"{v:.4g}" for v in ticks]
    for lam in infinite:
        ticks.append(place(lam))
        names.append("$\\infty$" if lam > 0 else "$-\\infty$")
    ax.set_xticks(ticks, names)
    reach = 0.04 * (high - low)
    ends = (
        (low if -math.inf in infinite else finite[0]) - reach,
        (high if math.inf in infinite else finite[-1]) + reach,
    )
    down = plans[0].levels[0].lam > plans[0].levels[-1].lam
    ax.set_xlim(ends[::-1] if down else ends)
    ax.set_xlabel("$\\lambda$ = log(alpha / sigma)")
    kept: list[tuple[float, str]] = []
    for level in (levels[0], levels[-1], *levels[1:-1]):  # the ends first
        x = place(level.lam)
        if all(abs(x - other) > fraction * (ends[1] - ends[0]) for other, _ in kept):
            kept.append((x, f"{float(level.sigma):.3g}\n{float(level.t):.3g}"))
    above = ax.secondary_xaxis("top")
    above.set_xticks([x for x, _ in kept], [text for _, text in kept], fontsize=7.5)
    above.set_xlabel(f"sigma (upper line) and t (lower line) of nodes{note}", fontsize=8)
    return place


def _dot(
    ax: Any, x: float, y: float, lam: float, asked: bool, colour: str, mark: str = "o"
) -> None:
    """A node: filled where the network is asked, an open arrow at infinite lambda."""
    ends = not math.isfinite(lam)
    if ends:
        forward = (lam > 0) == (ax.get_xlim()[1] > ax.get_xlim()[0])
        mark = ">" if forward else "<"
    face = colour if asked and not ends else "white"
    size = 9 if ends else 6.5
    ax.plot([x], [y], mark, color=colour, markerfacecolor=face, markersize=size, zorder=4)
    if asked and ends:
        ax.plot([x], [y], ".", color=colour, markersize=4.5, zorder=5)


def _nodes(ax: Any, plan: Plan, size: float) -> None:
    """A line per state: from the state before to its own lambda, in the colour of its order."""
    from matplotlib.lines import Line2D

    place = _axis(ax, [plan], 0.085)
    orders: dict[int, str] = {}
    short = 0.016 * abs(ax.get_xlim()[1] - ax.get_xlim()[0])
    for k, level in enumerate(plan.levels):
        x, call = place(level.lam), plan.calls[k]
        if k >= plan.given:
            row = plan.rows[k - plan.given]
            before = place(plan.levels[k - 1].lam)
            colour = orders[row.order] = _COLOURS[min(row.order, len(_COLOURS) - 1)]
            ax.plot([before, before], [k - 1, k], color="0.8", linewidth=0.8, zorder=1)
            # What stays at its level, a corrector for example, shows its order, too.
            ends = [before, x] if before != x else [x - short, x + short]
            ax.plot(ends, [k, k], color=colour, linewidth=3.2, zorder=2)
        _dot(ax, x, k, float(level.lam), call is not None, "0.15")
        if call is not None and call.level is not None:
            at = place(call.level.lam)
            ax.plot([x, at], [k, k], ":", color="0.15", linewidth=1, zorder=3)
            ax.plot([at], [k], "D", color="0.15", markerfacecolor="#f0e442", markersize=5, zorder=5)
    ax.set_ylim(len(plan.levels) - 0.5, -0.5)
    every = math.ceil(6.0 / size) if size < 6 else 1
    shown = range(0, len(plan.levels), every)
    ax.set_yticks(list(shown), [f"X{k}" for k in shown], fontsize=max(size, 6))
    ax.grid(axis="x", alpha=0.25)

    def mark(shape: str, face: str, label: str) -> Any:
        look: dict[str, Any] = {"marker": shape, "color": "0.15", "markerfacecolor": face}
        return Line2D([], [], linestyle="", label=label, **look)

    handles: list[Any] = [
        Line2D([], [], color=orders[p], linewidth=3.2, label=f"order {p}") for p in sorted(orders)
    ]
    handles.append(mark("o", "0.15", "network asked"))
    pairs = zip(plan.calls, plan.levels, strict=True)
    if any(call is None and math.isfinite(float(level.lam)) for call, level in pairs):
        handles.append(mark("o", "white", "not asked"))
    if any(not math.isfinite(float(level.lam)) for level in plan.levels):
        asked = any(
            call is not None and not math.isfinite(float(level.lam))
            for call, level in zip(plan.calls, plan.levels, strict=True)
        )
        more = ", with a dot: asked" if asked else ""
        handles.append(mark(">", "white", f"infinite $\\lambda${more}"))
    if any(call is not None and call.level is not None for call in plan.calls):
        handles.append(mark("D", "#f0e442", "asked as if here"))
    # The run goes from the upper left to the lower right.
    ax.legend(handles=handles, loc="upper right", fontsize=7.5, framealpha=0.9)


# -- numbers and cells -----------------------------------------------------------------------------


def _numbers(plan: Plan) -> dict[str, list[str]]:
    """Columns of text, an entry per state."""
    out: dict[str, list[str]] = {"sigma": [], "t": [], "h": [], "order": [], "told": []}
    noise = [""] * plan.given
    for k, level in enumerate(plan.levels):
        out["sigma"].append(f"{float(level.sigma):.3g}")
        out["t"].append(f"{float(level.t):.3g}")
        call = plan.calls[k]
        out["told"].append("" if call is None else f"{float(call.c_noise):.4g}")
        if k < plan.given:
            out["h"].append("")
            out["order"].append("")
            continue
        row, before = plan.rows[k - plan.given], plan.levels[k - 1].lam
        h = 0.0 if before == level.lam else float(level.lam - before)
        out["h"].append(f"{h:.3g}")
        out["order"].append(f"{row.order}{'' if row.exact else '~'}")
        share = math.sqrt(_variance(row)) / float(level.sigma) if level.sigma else 0.0
        noise.append(f"{share:.2g}" if row.e else "")
    if plan.stochastic:
        out["drawn"] = noise
    return out


def _written(ax: Any, plan: Plan, size: float) -> None:
    columns = _numbers(plan)
    every = math.ceil(6.0 / size) if size < 6 else 1
    for i, entries in enumerate(columns.values()):
        for k in range(0, len(entries), every):
            ax.text(i, k, entries[k], ha="center", va="center", fontsize=max(size, 6.0))
    ax.set_xlim(-0.5, len(columns) - 0.5)
    ax.set_xticks(range(len(columns)), columns, fontsize=8)
    ax.xaxis.tick_top()
    ax.tick_params(length=0, labelleft=False)
    for spine in ax.spines.values():
        spine.set_visible(False)
    notes = ["told: what the network is told"]
    if plan.stochastic:
        notes.append("drawn: new noise / sigma")
    if any(not row.exact for row in plan.rows):
        notes.append("~ exact only to its order")
    ax.set_xlabel("\n".join(notes), fontsize=7.5)


def _state_columns(plan: Plan) -> tuple[list[int], dict[int, dict[int, int]], list[str]]:
    """Columns of states, for every state made a map of states read to columns, and the names:
    how far back they are, or which they are, whatever takes fewer columns."""
    made = [(k, j) for k, row in enumerate(plan.rows, plan.given) for j in row.a]
    back, own = sorted({k - j for k, j in made}), sorted({j for _, j in made})
    which: dict[int, dict[int, int]] = {}
    for k, j in made:
        which.setdefault(k, {})[j] = k - j if len(back) < len(own) else j
    if len(back) < len(own):
        return back, which, [f"X[k-{n}]" for n in back]
    return own, which, [f"X{j}" for j in own]


def _one(c: Coefficient) -> float:
    """A coefficient as a number: the mean over modes."""
    return float(np.mean(c))


def _variance(row: Row) -> float:
    """Of the noise that a row adds; the mean over modes."""
    return float(sum((np.mean(np.square(c)) for c in row.e.values()), 0.0))


def _cells(
    ax: Any,
    plan: Plan,
    columns: Sequence[int],
    which: dict[int, dict[int, int]],
    names: Sequence[str],
    size: float,
    inches: float,
    constant: bool = False,
    data: bool = False,
) -> None:
    """Coefficients: a cell per term, its shade relative to the largest of the row."""
    place = {c: i for i, c in enumerate(columns)}
    wide = max(1, len(columns))
    values = np.full((len(plan.levels), wide + constant), math.nan)
    sizes = np.full(len(plan.levels), math.nan)
    for k, row in enumerate(plan.rows, plan.given):
        for j, c in (row.b if data else row.a).items():
            values[k, place[which[k][j]]] = _one(c)
        if constant and row.shifts:
            sizes[k] = math.sqrt(float(np.mean(np.square(row.c))))
    known = np.nan_to_num(np.abs(values)).max(1, keepdims=True)
    share = values / np.where(known > 0, known, 1.0)
    # Small terms are seen, too: shades are those of the square root.
    shade = np.sign(share) * np.sqrt(np.abs(share))
    ax.pcolormesh(
        np.arange(wide + constant + 1) - 0.5,
        np.arange(len(plan.levels) + 1) - 0.5,
        np.ma.masked_invalid(shade),
        cmap="RdBu",
        vmin=-1.35,
        vmax=1.35,
        edgecolors="white",
        linewidth=0.6 if size > 5 else 0.0,
    )
    if inches / (wide + constant) >= _WRITTEN and size >= 5:
        for k, i in np.argwhere(np.isfinite(values)):
            dark = abs(shade[k, i]) > 0.85
            text = f"{values[k, i]:.2g}"
            colour = "white" if dark else "black"
            ax.text(i, k, text, ha="center", va="center", fontsize=min(size, 7.5), color=colour)
    for k in np.flatnonzero(np.isfinite(sizes)):
        text = f"{sizes[k]:.2g}"
        ax.text(wide, k, text, ha="center", va="center", fontsize=min(size, 7.5))
    every = max(1, math.ceil(0.35 * len(columns) / inches))
    ticks = list(range(0, len(columns), every))
    labels = [names[i] for i in ticks]
    if constant:
        ticks.append(wide)
        labels.append("c")
    ax.set_xticks(
        ticks, labels, fontsize=7.5, rotation=60 if inches < 0.4 * wide and not data else 0
    )
    ax.set_xlim(-0.5, wide + constant - 0.5)
    ax.tick_params(axis="y", labelleft=False, left=False)
    notes = ["numbers: means over modes"] * (plan.basis is not None)
    notes += ["c: size of the constant"] * constant
    if not columns:
        notes.append("none")
    ax.set_xlabel("\n".join(notes), fontsize=7.5)


# -- noise -----------------------------------------------------------------------------------------


def _drawn(axes: Any, plan: Plan) -> None:
    """Of every state, how much of its noise was drawn in making it, and how large both are."""
    seen: set[int] = set()
    fresh, again, states = [], [], range(plan.given, len(plan.levels))
    for row in plan.rows:
        parts = {m: float(np.mean(np.square(c))) for m, c in row.e.items()}
        fresh.append(sum((v for m, v in parts.items() if m not in seen), 0.0))
        again.append(sum((v for m, v in parts.items() if m in seen), 0.0))
        seen |= set(parts)
    sigma = np.array([float(np.mean(plan.levels[k].sigma)) for k in states])
    squared = np.where(sigma > 0, sigma, 1.0) ** 2
    new, old = np.array(fresh) / squared, np.array(again) / squared
    ax, beside = axes
    ax.bar(states, new, color=_COLOURS[2], label="of a draw not used before")
    if np.any(old > 0):
        ax.bar(states, old, bottom=new, color=_COLOURS[5], label="of a draw used before")
    ax.axhline(1.0, color="0.5", linewidth=0.8, linestyle=":")
    ax.set_ylim(0, max(1.05, 1.1 * float((new + old).max())))
    ax.set_xlabel("state made")
    ax.set_ylabel("variance drawn / sigma$^2$")
    ax.set_title("part of the noise of a state that is drawn in making it", fontsize=10)
    ax.legend(fontsize=8)
    size = np.sqrt(np.array(fresh) + np.array(again))
    for values, label, colour, mark in (
        (sigma, "sigma of the state", "0.4", "o-"),
        (size, "standard deviation drawn", _COLOURS[2], "s"),
    ):
        some = values > 0
        beside.plot(np.array(states)[some], values[some], mark, color=colour, label=label)
    beside.set_yscale("log")
    beside.set_xlabel("state made")
    beside.set_title("sizes; zeros are left out", fontsize=10)
    beside.grid(alpha=0.25)
    beside.legend(fontsize=8)
    for one in axes:
        one.set_xlim(states[0] - 0.6, states[-1] + 0.6)
        one.xaxis.get_major_locator().set_params(integer=True)


# -- several plans ---------------------------------------------------------------------------------


def _labels(plans: Sequence[Plan]) -> list[str]:
    """What tells plans apart: solver, process, grid and NFE where these differ."""
    facts = [{**p.about, "nfe": f"{p.nfe} NFE"} for p in plans]
    keys = [k for k in ("solver", "process", "grid", "nfe") if len({f.get(k) for f in facts}) > 1]
    names = [", ".join(f[k] for k in keys if k in f) for f in facts]
    if len(set(names)) == len(names):
        return names
    return [f"{i}: {name}".rstrip(": ") for i, name in enumerate(names, 1)]


def _several(new: Callable[..., Any], plans: Sequence[Plan]) -> Any:
    """Nodes of all plans on one axis, and the sizes of their steps."""
    figure = new(figsize=(12, min(_TALLEST, 5.4 + 0.5 * len(plans))), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(0.5 * len(plans) + 0.6, 3.2))
    names = _labels(plans)
    place = _axis(above, plans, 0.055, f" of {names[0]}; filled: network asked")
    for i, (plan, name) in enumerate(zip(plans, names, strict=True)):
        colour, mark = _COLOURS[1 + i % len(_MARKS)], _MARKS[i % len(_MARKS)]
        xs = [place(level.lam) for level in plan.levels]
        above.plot(xs, [i] * len(xs), color=colour, linewidth=1.2, zorder=1)
        asked = {x for x, call in zip(xs, plan.calls, strict=True) if call is not None}
        # A corrected state lies on the one that was asked about: the place is filled.
        for x, lam in {x: float(v.lam) for x, v in zip(xs, plan.levels, strict=True)}.items():
            _dot(above, x, i, lam, x in asked, colour, mark)
        with np.errstate(invalid="ignore"):
            h = np.diff(np.array([float(level.lam) for level in plan.levels]))
        h = h[plan.given - 1 :]
        h = h[h != 0]
        k, fine = np.arange(1, len(h) + 1), np.isfinite(h)
        below.plot(k[fine], np.abs(h[fine]), f"{mark}-", color=colour, label=name)
    above.set_yticks(range(len(plans)), names)
    above.set_ylim(len(plans) - 0.5, -0.5)
    above.grid(axis="x", alpha=0.25)
    below.set_yscale("log")
    below.yaxis.set_major_formatter("{x:.3g}")
    below.yaxis.set_minor_formatter("{x:.3g}")
    below.set_xlabel("step")
    below.set_ylabel("|h|, step in $\\lambda$")
    below.set_title("sizes of the finite steps", fontsize=9)
    below.grid(which="both", alpha=0.25)
    below.legend(fontsize=8)
    below.xaxis.get_major_locator().set_params(integer=True)
    common = [f"{plans[0].nfe} NFE"] if len({p.nfe for p in plans}) == 1 else []
    for key in ("process", "solver"):
        found = {p.about.get(key) for p in plans}
        if len(found) == 1 and None not in found:
            common.insert(0, str(found.pop()))
    figure.suptitle(", ".join(common), fontsize=12)
    return figure
