"""Pictures of plans: what is in them, for every kind of plan."""

import math
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import fewstep as fs
from fewstep import _plan_picture
from fewstep._calibrate._program import answered, plan_of, program_of


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws, checks the file, and gives the figure."""
    figures = []

    class Kept(Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr("matplotlib.figure.Figure", Kept)
    whole = fs.Stability._plot_regions

    def draw(plan, *others, regions=False):
        # Regions take most of the time, and are tested with the analysis.
        drawn = whole if regions else lambda *_: None
        monkeypatch.setattr(fs.Stability, "_plot_regions", drawn)
        plan.plot(tmp_path / "plan.png", *others)
        with Image.open(tmp_path / "plan.png") as image:
            inches = [n / 120 for n in image.size]
        assert 8 <= inches[0] <= 15
        assert inches[1] <= 15.1
        return figures[-1]

    return draw


def axes(figure):
    """Nodes, numbers, states read, predictions read, and the two below."""
    return figure.axes


def texts(ax):
    return [t.get_text() for t in ax.texts]


def numbers(ax):
    """Columns by name, from the texts of the table."""
    out = {}
    names = [t.get_text() for t in ax.get_xticklabels()]
    for t in ax.texts:
        x, y = t.get_position()
        out.setdefault(names[x], {})[y] = t.get_text()
    return out


def cells(ax):
    """The values of a table of coefficients, as written."""
    return {
        (t.get_position()[1], t.get_position()[0]): float(t.get_text())
        for t in ax.texts
        if t.get_text()
    }


def overlaps(figure, ax):
    """Pairs of texts of an axes that lie on each other, when drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [t.get_window_extent(renderer) for t in ax.texts if t.get_text()]
    return [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_numbers_are_those_of_the_plan(drawn):
    plan = fs.plan("dpmpp_3m", fs.VP(), 8)
    figure = drawn(plan, regions=True)
    nodes, table, states, data = axes(figure)[:4]
    found = numbers(table)
    for k, level in enumerate(plan.levels):
        assert found["sigma"][k] == f"{level.sigma:.3g}"
        assert found["t"][k] == f"{level.t:.3g}"
        call = plan.calls[k]
        assert found["told"].get(k) == ("" if call is None else f"{call.c_noise:.4g}")
    for k, row in enumerate(plan.rows, 1):
        assert found["order"][k] == str(row.order)
        h = plan.levels[k].lam - plan.levels[k - 1].lam
        assert found["h"][k] == f"{h:.3g}"
    written = cells(data)
    assert written == {
        (k, j): float(f"{c:.2g}") for k, row in enumerate(plan.rows, 1) for j, c in row.b.items()
    }
    assert any(v < 0 for v in written.values())
    assert cells(states) == {
        (k, 0): float(f"{row.a[k - 1]:.2g}") for k, row in enumerate(plan.rows, 1) if row.a
    }
    assert [t.get_text() for t in states.get_xticklabels()] == ["X[k-1]"]
    assert "order 3" in [t.get_text() for t in nodes.get_legend().get_texts()]
    assert not overlaps(figure, data)
    assert not overlaps(figure, table)
    regions = plan.stability()
    assert any(f"limit {regions.limit:.3g}" in t for t in texts(axes(figure)[4]))


def test_signs_are_colours(drawn):
    plan = fs.plan("dpmpp_2m", fs.VP(), 5)
    mesh = axes(drawn(plan))[3].collections[0]
    values = mesh.get_array().reshape(len(plan.levels), -1)
    for k, row in enumerate(plan.rows, 1):
        for j in range(plan.nfe):
            c = row.b.get(j)
            shade = values[k, j]
            assert np.ma.is_masked(shade) if c is None else np.sign(shade) == np.sign(c)
        assert np.ma.max(np.abs(values[k])) == pytest.approx(1.0)


def markers(ax):
    """(x, y) to the marker and whether it is filled."""
    out = {}
    for line in ax.lines:
        if len(line.get_xdata()) == 1 and line.get_marker() in ("o", ">", "<", "D"):
            at = (float(line.get_xdata()[0]), int(line.get_ydata()[0]))
            out[at] = (line.get_marker(), line.get_markerfacecolor() != "white")
    return out


def test_filled_nodes_are_asked_and_arrows_are_infinite(drawn):
    plan = fs.plan("unipc_3", fs.Flow(shift=3.0), 6)  # from alpha = 0 to sigma = 0
    ax = axes(drawn(plan))[0]
    found = {y: v for (_, y), v in markers(ax).items()}
    for k, (level, call) in enumerate(zip(plan.levels, plan.calls, strict=True)):
        if math.isfinite(level.lam):
            assert found[k] == ("o", call is not None)
        else:
            assert found[k] == ("<" if level.lam < 0 else ">", False)
    assert ax.get_xticklabels()[-1].get_text() in ("$\\infty$", "$-\\infty$")
    dots = [line for line in ax.lines if line.get_marker() == "."]
    assert [int(line.get_ydata()[0]) for line in dots] == [0]  # the first is asked at infinity


def test_upward_runs_go_left_to_right(drawn):
    ax = axes(drawn(fs.plan("dpmpp_2m", fs.Flow(), 4, upward=True)))[0]
    assert ax.get_xlim()[1] < ax.get_xlim()[0]
    found = {y: v for (_, y), v in markers(ax).items()}
    assert found[4] == (">", False)  # alpha = 0, at the right


def test_draws(drawn):
    plan = fs.plan("seeds_3", fs.EDM(), 12)
    figure = drawn(plan)
    drawn_column = numbers(axes(figure)[1])["drawn"]
    for k, row in enumerate(plan.rows, 1):
        variance = sum(c * c for c in row.e.values())
        sigma = plan.levels[k].sigma
        said = f"{math.sqrt(variance) / sigma:.2g}" if row.e else ""
        assert drawn_column[k] == said
    bars = axes(figure)[4].patches
    n = len(plan.rows)
    total = [a.get_height() + b.get_height() for a, b in zip(bars[:n], bars[n:], strict=True)]
    want = [
        sum(c * c for c in row.e.values()) / plan.levels[k].sigma ** 2 if row.e else 0.0
        for k, row in enumerate(plan.rows, 1)
    ]
    assert total == pytest.approx(want)
    seen = set()
    for bar, row in zip(bars[:n], plan.rows, strict=True):
        assert (bar.get_height() > 0) == bool(set(row.e) - seen)
        seen |= set(row.e)


def test_a_free_first_step_and_constants(drawn):
    model = fs.exact.digits().denoiser(fs.EDM())
    program = program_of(fs.plan("flow_ipndm_2", model, 6))
    plan = plan_of(answered(program, torch.full((1, 8, 8), 0.5)), model)
    assert plan.calls[0] is None
    figure = drawn(plan)
    nodes, table, states, data = axes(figure)[:4]
    assert {y: v for (_, y), v in markers(nodes).items()}[0] == ("o", False)
    assert [t.get_text() for t in states.get_xticklabels()][-1] == "c"
    sizes = {k: float(np.sqrt(np.mean(np.square(r.c)))) for k, r in enumerate(plan.rows, 1)}
    shown = {int(t.get_position()[1]): t.get_text() for t in states.texts[-len(plan.rows) :]}
    assert {k: f"{v:.2g}" for k, v in sizes.items() if v} == {k: shown[k] for k in shown}
    assert not overlaps(figure, table)
    assert not overlaps(figure, data)


def test_one_step_and_many(drawn):
    figure = drawn(fs.plan("ddim", fs.EDM(), 1))
    assert len(axes(figure)) == 4
    below = [t.get_text() for f in figure.subfigs for t in f.texts]
    assert any("no step of finite size" in t for t in below)
    figure = drawn(fs.plan("dpmpp_2m", fs.VP(), 60))
    assert not texts(axes(figure)[3])  # cells are too narrow for numbers
    assert not overlaps(figure, axes(figure)[1])


def test_plans_that_start_from_several_states(drawn):
    plan = fs.plan("reversible_heun", fs.VP(), 6, final="min").inverse()
    assert plan.given == 2
    found = numbers(axes(drawn(plan))[1])
    assert [found["order"][k] for k in range(3)] == ["", "", str(plan.rows[0].order)]
    # Every step is one of the rows: the states it starts from are not made by any.
    assert len(plan.stability().steps) == len(plan.rows)


def test_several(drawn):
    grids = ("softened", "karras", "uniform")
    plans = [fs.plan("dpmpp_2m", fs.VP(), 7, grid=grid) for grid in grids]
    above, below = axes(drawn(*plans))[:2]
    assert [t.get_text() for t in above.get_yticklabels()] == list(grids)
    for plan, line in zip(plans, below.lines, strict=True):
        h = np.diff([level.lam for level in plan.levels])
        assert line.get_ydata() == pytest.approx(h[np.isfinite(h)])
    same = _plan_picture._labels([plans[0], plans[0]])
    assert same == ["1", "2"]


def test_stacked_plans_and_missing_matplotlib(tmp_path, monkeypatch):
    plans = [fs.plan("ddim", fs.EDM(), 4, start={"sigma": s}) for s in (1.0, 5.0)]
    with pytest.raises(ValueError, match="plot is not defined for a plan with levels along"):
        fs.stacked(plans, axis=-4).plot(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="fewstep"):
        plans[0].plot(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", fs.solvers)
def test_every_solver(name, drawn):
    for process in (fs.VP(), fs.Flow(shift=3.0)):
        try:
            plan = fs.plan(name, process, 7)
        except ValueError:
            continue
        figure = drawn(plan)
        assert not overlaps(figure, axes(figure)[1])
        assert not overlaps(figure, axes(figure)[3])


class TestCommand:
    @pytest.fixture
    def run(self):
        from typer.testing import CliRunner

        from fewstep._commands import app

        return lambda *args: CliRunner().invoke(app, ["plan", *map(str, args)])

    def test_plot(self, run, tmp_path):
        out = tmp_path / "p.png"
        done = run("unipc_2", "--nfe", 6, "--plot", out)
        assert done.exit_code == 0, done.output
        assert f"drawn to {out}" in done.output
        assert out.stat().st_size > 20_000

    def test_several_grids(self, run, tmp_path):
        out = tmp_path / "p.png"
        done = run("dpmpp_2m", "--nfe", 6, "--grid", "softened, karras", "--plot", out)
        assert done.exit_code == 0, done.output
        assert done.output.count("solver: dpmpp_2m") == 2
        assert out.stat().st_size > 20_000
        done = run("dpmpp_2m", "--grid", "softened,karras", "--save", tmp_path / "p.safetensors")
        assert "--save writes one plan" in str(done.exception)
        assert "softned" in str(run("dpmpp_2m", "--grid", "karras,softned").exception)
        assert run("ddim", "--grid", "1.0,0.5,0.1,0.0").exit_code == 0

    def test_refusals_come_first(self, run, tmp_path):
        done = run("ddim", "--plot", tmp_path / "p.abc")
        assert "plot = " in str(done.exception)
        done = run("ddim", "--plot", tmp_path / "no" / "p.png")
        assert "does not exist" in str(done.exception)
