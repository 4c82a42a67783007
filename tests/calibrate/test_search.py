"""Schedules and the search for them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import spearmanr

import fewstep as fs
from fewstep._calibrate import _search
from fewstep._calibrate._schedule import FIRST, WEIGHTS, Choice, Schedule, schedule_of
from fewstep._calibrate._search import History, run_together, search
from fewstep._calibrate._teacher import Counted, Teacher, teach
from fewstep._weights import FORMS, VARIABLES, scale
from problems import PROCESSES

METHODS = ("random", "evolutionary", "coordinate", "staged")


def in_space(name: str) -> bool:
    try:
        schedule_of(name, fs.EDM(), 4)
    except ValueError:
        return False
    return True


IN_SPACE = [name for name in fs.solvers if in_space(name)]


def model_2d(process: fs.Process | None = None) -> fs.Denoiser:
    means = np.random.default_rng(0).standard_normal((5, 2))
    mixture = fs.exact.Mixture(np.full(5, 0.2), means, np.full((5, 2), 0.04))
    return mixture.denoiser(process or fs.Flow(), "flow")


@pytest.fixture(scope="module")
def teachers() -> tuple[Teacher, Teacher]:
    model = model_2d()
    return teach(model, (2,), 24, seed=1), teach(model, (2,), 16, seed=2)


# -- Schedules -----------------------------------------------------------------------------------


def test_the_space_holds_the_families():
    assert {"ddim", "dpmpp_2m", "dpmpp_3m_shipped", "unipc_3_bh1", "deis_tab3"} <= set(IN_SPACE)
    assert {"ipndm_4", "flow_ipndm_2", "flow_pc2", "v_ab4", "dpmpp_3m_shipped_heun"} <= set(
        IN_SPACE
    )
    assert len(IN_SPACE) >= 38


@pytest.mark.parametrize("name", IN_SPACE)
def test_a_solver_is_a_schedule(name):
    for process, nfe, grid in itertools.product(
        ("edm", "flow", "vp", "scaled-linear table"), (1, 2, 6), ("softened", "karras")
    ):
        on = PROCESSES[process]
        schedule = schedule_of(name, on, nfe, grid=grid)
        mine, true = schedule.plan(on), fs.plan(name, on, nfe, grid=grid)
        assert mine.nfe == nfe == schedule.nfe
        assert len(mine.rows) == len(true.rows)
        assert [r.order for r in mine.rows] == [r.order for r in true.rows]
        for a, b in zip(mine.rows, true.rows, strict=True):
            for found, want in ((a.a, b.a), (a.b, b.b)):
                for k in {*found, *want}:
                    assert found.get(k, 0.0) == pytest.approx(
                        want.get(k, 0.0), rel=1e-14, abs=1e-14
                    )
        assert Schedule.from_dict(schedule.to_dict()) == schedule


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variable", VARIABLES)
def test_taylor_factors_scale_the_terms_of_the_polynomial(form, variable):
    process = fs.VP()
    levels = [process.level(t) for t in (0.55, 0.6, 0.72, 0.8)]
    end, start = process.level(0.4), levels[0]
    factors, c = (0.7, 1.3, -0.4), (0.3, -1.1, 0.8, 0.5)

    def zeta(level: fs.Level) -> float:
        return {
            "data": level.alpha / level.sigma,
            "noise": level.sigma / level.alpha,
            "v": math.atan2(level.sigma, level.alpha),
            "flow": level.sigma / (level.alpha + level.sigma),
        }[form]

    def u(level: fs.Level) -> float:
        of = {"lambda": level.lam, "t": level.t, "rho": level.rho, "own": zeta(level)}
        return of[variable]

    def taylor(level: fs.Level, r: Sequence[float]) -> float:
        d = u(level) - u(start)
        return c[0] + sum(f * k * d**n for n, (f, k) in enumerate(zip(r, c[1:], strict=True), 1))

    def data(level: fs.Level, x: float) -> float:
        """D of M."""
        M, n = taylor(level, (1, 1, 1)), scale(form, level)
        if form == "data":
            return M
        return ((level.alpha / n if form == "v" else 1.0) * x - level.sigma * M) / n

    row = Choice(4, form, variable, relax=factors).predict(process, levels, end)
    x = [0.2, -1.0, 0.4, 2.0]
    got = sum(
        a * v + b * data(level, v) for a, b, v, level in zip(row.a, row.b, x, levels, strict=True)
    )
    integral = _integral(process, lambda n: taylor(n, factors), zeta, start, end)
    want = scale(form, end) * (x[0] / scale(form, start) + integral)
    assert got == pytest.approx(want, abs=1e-9)
    assert row.order == 1
    exact = Choice(4, form, variable).predict(process, levels, end)
    ones = Choice(4, form, variable, relax=(1, 1, 1)).predict(process, levels, end)
    assert (exact.a, exact.b, exact.order) == (ones.a, ones.b, 4)
    assert Choice(3, form, variable, relax=(1, 0.5)).predict(process, levels, end).order == 2


def _integral(process, f, zeta, start, end) -> float:
    """int f dzeta, over lambda."""

    def integrand(lam: float) -> float:
        here, step = process.level(float(process.time(lam))), 1e-5
        a, b = (process.level(float(process.time(lam + d))) for d in (-step, step))
        return f(here) * (zeta(b) - zeta(a)) / (2 * step)

    return quad(integrand, start.lam, end.lam, epsabs=1e-12, epsrel=1e-11)[0]


def test_published_factors_are_points_of_the_space():
    """DPM-Solver++ 2M and UniPC's B(h) as factors of the first derivative (data form: h -> -h)."""
    process = fs.VP()
    levels, end = [process.level(t) for t in (0.5, 0.7)], process.level(0.35)
    h = -(end.lam - levels[0].lam)
    whole = math.expm1(h) - h
    factors = {"midpoint": 0.5 * h * math.expm1(h) / whole, "bh1": 0.5 * h**2 / whole}
    for name, factor in factors.items():
        relaxed = Choice(2, relax=(factor,)).predict(process, levels, end)
        named = Choice(2, weights=name).predict(process, levels, end)
        assert relaxed.b == pytest.approx(named.b, rel=1e-11)


def test_an_analytic_first_step_buys_a_node():
    mean = np.array([0.3, -0.2])
    for first in FIRST:
        schedule = schedule_of("dpmpp_2m", fs.EDM(), 5, first=first)
        run = schedule.plan(fs.EDM(), mean=mean)
        assert run.nfe == schedule.nfe == 5
        assert len(schedule.choices) == 5 + (first != "network")
    plain = schedule_of("dpmpp_2m", fs.EDM(), 6).plan(fs.EDM())
    want = fs.analytic_first(plain, 0.0, mean)
    assert schedule_of("dpmpp_2m", fs.EDM(), 5, first="mean").plan(fs.EDM(), mean=mean) == want


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Choice(5), "order = 5"),
        (lambda: Choice(2, "epsilon"), "form = 'epsilon'"),
        (lambda: Choice(2, weights="bh3"), "weights = 'bh3'"),
        (lambda: Choice(2, variable="t", weights="midpoint"), "variable = 't'"),
        (lambda: Choice(2, weights="adams"), "weights = 'adams'"),
        (lambda: Choice(2, weights="midpoint", relax=(0.5,)), "relax = "),
        (lambda: Choice(2, relax=(math.nan,)), "relax = "),
        (lambda: Schedule((1.0, 0.5), (Choice(), Choice())), "choices has 2"),
        (lambda: Schedule((1.0, 0.0), (Choice(),), "zero"), "first = 'zero'"),
        (lambda: Schedule((1.0, 0.5, 0.0), (Choice(), Choice()), "none"), "first = 'none'"),
        (lambda: schedule_of("heun", fs.EDM(), 4), "solver = 'heun'"),
        (lambda: schedule_of(fs.exponential(5), fs.EDM(), 4), "5 nodes"),
        (lambda: schedule_of("ddim", fs.EDM(), 4).solver().steps(5, True), "nfe = 5"),
        (lambda: schedule_of("ddim", fs.EDM(), 4, first="mean").plan(fs.EDM()), "mean is missing"),
    ],
)
def test_schedules_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- The space -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
def test_every_proposal_is_a_schedule_of_the_process(name):
    process, rng = PROCESSES[name], np.random.default_rng(0)
    final = "min" if process.t_clean is None else "zero"
    for nfe in (1, 2, 6):
        space = _search._Space(process, process.integer_times, nfe, FIRST)
        pool = [schedule_of("ddim", process, nfe, final=final)]
        for _ in range(12):
            a, b = (pool[int(rng.integers(len(pool)))] for _ in range(2))
            pool += [space.random(rng), space.mutate(rng, a, 1.0), space.cross(rng, a, b)]
            pool.append(space.nudge(rng, b))
        for s in pool:
            assert s.nfe == nfe
            assert s.times[0] == process.t_start
            assert s.times[-1] == space.last
            # rows may be refused where a formula has no finite value; times never are
            ddim = Schedule(s.times, (Choice(1),) * len(s.choices), s.first)
            assert ddim.plan(process, mean=0.0).nfe == nfe
        assert nfe < 6 or len({s.first for s in pool}) == 3
        assert {w for s in pool for w in (c.weights for c in s.choices)} == set(WEIGHTS) or nfe < 6


def test_a_mutant_keeps_the_times_that_it_does_not_move():
    rng, process = np.random.default_rng(0), fs.EDM()
    space = _search._Space(process, False, 6, ("network",))
    s = schedule_of("dpmpp_2m", process, 6)
    u = space.clock(s)
    u[2] += 1e-3
    moved = space.with_clock(s, u).times
    assert [a == b for a, b in zip(moved, s.times, strict=True)] == [i != 3 for i in range(7)]
    assert space.mutate(rng, s, 1.0) != s


# -- Searching -----------------------------------------------------------------------------------


def test_run_together_gives_the_errors_of_each_alone(teachers):
    train, _ = teachers
    mean = np.zeros(2)
    plans = [
        schedule_of(name, train.model, nfe, grid=grid, first=first).plan(train.model, mean=mean)
        for name, nfe, grid, first in (
            ("dpmpp_2m", 4, "softened", "network"),
            ("unipc_3", 6, "uniform", "mean"),
            ("flow_ipndm_2", 4, "lambda", "zero"),
        )
    ]
    for found, run in zip(run_together(train, plans), plans, strict=True):
        np.testing.assert_allclose(found, train.errors(run), rtol=1e-4)
    few = Teacher(train.model, train.x, train.samples, batch=9)  # several network calls
    np.testing.assert_allclose(run_together(few, plans), run_together(train, plans), rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_search(method, teachers, monkeypatch):
    monkeypatch.setattr(_search, "_OFFSPRING", 3)
    train, held = teachers
    model = Counted(train.model)
    counted = Teacher(model, train.x, train.samples)
    starts = [schedule_of(name, model, 4) for name in ("ddim", "dpmpp_2m", "unipc_3")]
    options: dict[str, Any] = {"method": method, "candidates": 96, "screen": 8, "starts": starts}
    found = search(counted, held, 4, seed=3, **options)
    assert found.candidates == 96
    assert found.plan.nfe == found.schedule.nfe == 4
    assert found.schedule in {t.schedule for t in found.history.tried}
    np.testing.assert_allclose(found.errors, held.errors(found.plan), rtol=1e-4)
    # never worse than what it began with, and these searches are long enough to be better
    log = [np.log(e).mean() for e in (found.errors, found.start_errors)]
    assert log[0] <= log[1]
    if method != "random":
        assert log[0] < log[1] - 0.1
    best = [b for *_, b in found.history.curve]
    assert best == sorted(best, reverse=True)
    # what it says it spent on training noises is what the network saw
    assert model.evaluations == found.history.curve[-1][1]
    again = search(train, held, 4, seed=3, **options)
    assert again.history.tried == found.history.tried
    assert again.schedule == found.schedule


def test_search_goes_on_where_it_stopped(teachers, tmp_path: Path):
    train, held = teachers
    options: dict[str, Any] = {"method": "evolutionary", "evaluations": 3000, "screen": 8}
    options["starts"] = [schedule_of("ddim", train.model, 4)]
    whole = search(train, held, 4, **options)

    def stop(history: History) -> None:
        if len(history.tried) > 40:
            history.save(tmp_path / "history.json")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(train, held, 4, each=stop, **options)
    model = Counted(train.model)
    counted = Teacher(model, train.x, train.samples, batch=train.batch)
    history = History.load(tmp_path / "history.json")
    resumed = search(counted, held, 4, history=history, **options)
    assert resumed.schedule == whole.schedule
    assert resumed.history.tried == whole.history.tried
    assert resumed.evaluations == whole.evaluations
    old = sum(4 * len(t.errors) for t in history.tried)
    assert model.evaluations == whole.history.curve[-1][1] - old
    assert whole.history.curve[-1][1] <= 3000
    with pytest.raises(ValueError, match="history has 8 errors"):
        search(train, held, 4, history=history, **{**options, "screen": 9})


def test_the_predictor_is_exact_where_its_jacobian_is():
    """Gaussian data of one standard deviation: the deviation it predicts is the error."""
    std = 0.7
    model = fs.exact.Gaussian(torch.zeros(6), std**2).denoiser(fs.EDM(), "data")
    train = teach(model, (6,), 8, seed=0, dtype=torch.float64)
    path = _search._Path(train, np.zeros(6))
    path.spread = std
    for name, nfe, first in itertools.product(IN_SPACE[::4], (3, 7), FIRST):
        schedule = schedule_of(name, model, nfe, first=first)
        error = np.log(train.errors(schedule.plan(model, mean=np.zeros(6)))).mean()
        predicted = path.features(schedule)[-2]
        if error > -8:  # of the recorded trajectory's own accuracy
            assert predicted == pytest.approx(error, abs=0.05), (name, nfe, first)


def test_the_predictor_ranks_what_it_has_not_seen(teachers):
    train, _ = teachers
    judge = _search._Judge(train, 16, np.zeros(2), math.inf, math.inf, math.inf, None, {})
    space = _search._Space(train.model.process, False, 5, FIRST)
    rng = np.random.default_rng(0)
    _search._hand_made(judge, space)
    predictor = _search._Predictor(judge)
    predictor.fit(judge.few)
    children = _search._children(judge, space, rng, 64)
    predicted = predictor(children)
    judge.look(children)
    true = np.minimum([judge.few[s] for s in children], 5.0)
    assert spearmanr(predicted, true).statistic > 0.6


def test_starts_conditions_and_small_numbers_of_evaluations(teachers):
    train, held = teachers
    for nfe, method in itertools.product((1, 2), METHODS):
        begin = [schedule_of("ddim", train.model, nfe)]
        found = search(train, held, nfe, method=method, candidates=25, screen=4, starts=begin)
        assert found.plan.nfe == nfe
        assert np.log(found.errors).mean() <= np.log(found.start_errors).mean()
    start = schedule_of("ddim", train.model, 3, grid="lambda")
    found = search(
        train, held, 3, method="coordinate", candidates=60, starts=[start], first=["network"]
    )
    assert found.start == start
    assert found.schedule.first == "network"
    assert np.median(found.errors) < 0.7 * np.median(found.start_errors)


def test_integer_times_stay_integers():
    model = model_2d(PROCESSES["scaled-linear table"])
    train, held = (teach(model, (2,), 8, seed=s) for s in (1, 2))
    starts = [schedule_of("dpmpp_2m", model, 4)]
    found = search(train, held, 4, method="evolutionary", candidates=60, starts=starts)
    assert found.plan.integer_times
    assert all(float(t).is_integer() for t in found.schedule.times[:-1])
    assert len({s.schedule.times for s in found.history.tried}) > 20
    assert np.median(found.errors) < np.median(found.start_errors)


def test_search_refuses(teachers):
    train, held = teachers
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "annealing", "candidates": 9}, "method = 'annealing'"),
        ({}, "candidates, evaluations and seconds are missing"),
        ({"candidates": 0}, "candidates = 0"),
        ({"seconds": -1.0}, "seconds = -1.0"),
        ({"candidates": 9, "screen": 0}, "screen = 0"),
        ({"candidates": 9, "first": ["mean"]}, "first = "),
        ({"candidates": 9, "first": ["network", "median"]}, "first = 'median'"),
        ({"evaluations": 3}, "not enough to judge one schedule"),
        ({"candidates": 9, "starts": [schedule_of("ddim", train.model, 4)]}, "4 evaluations"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            search(train, held, 3, **options)
    with pytest.raises(ValueError, match="nfe = 0"):
        search(train, held, 0, candidates=9)


def test_histories_refuse_other_files(tmp_path: Path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match="not the history of a search"):
        History.load(tmp_path / "a.json")
