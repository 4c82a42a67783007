"""Compensated plans, the search for their ratios, and the regression on them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import fewstep as fs
import official
from fewstep._basis import Cosine
from fewstep._calibrate._compensate import (
    Cascade,
    _minimum,
    compensated,
    fit_ratios,
)
from fewstep._calibrate._teacher import Counted, teach
from problems import Mixture, network_for

DETERMINISTIC = [name for name, entry in fs.solvers.items() if not entry.stochastic]
MIXTURE = Mixture()


def final(model: fs.Denoiser, plan: fs.Plan, x: torch.Tensor) -> np.ndarray:
    return fs.sample(model, solver=plan, x=x, progress=False).numpy()


def by_definition(plan, ratios, order, variable, of, x) -> np.ndarray:
    """A buffer of predictions whose newest entry is replaced once evaluation i has corrected its
    own state, in numpy."""
    states, raw, buffer, u, newest = [x], {}, {}, [], -1

    def data(k, answer):
        level = plan.asked(k)
        if of == "data" or level.alpha == 0:  # at the start, which is never replaced
            return raw[k] if level.alpha == 0 else answer
        return (states[k] - level.sigma * answer) / level.alpha

    for k, call in enumerate(plan.calls):
        if k:
            row = plan.rows[k - 1]
            corrects = call is None and plan.levels[k].t == plan.asked(newest).t
            D = {j: data(j, v) for j, v in buffer.items()}
            if corrects:
                D[newest] = raw[newest]
            total = [c * states[j] for j, c in row.a.items()]
            states.append(sum(total + [c * D[j] for j, c in row.b.items()]))
        if call is not None:
            level, newest, i = plan.asked(k), k, len(u)
            u.append(level.t if variable == "t" else level.lam)
            raw[k] = MIXTURE.denoise(states[k], level.alpha, level.sigma)
            noise = (states[k] - level.alpha * raw[k]) / level.sigma
            buffer[k] = raw[k] if of == "data" else noise
            if ratios[i] != 1:
                known = list(buffer)[-order - 1 :]
                at = u[i - 1] + ratios[i] * (u[i] - u[i - 1])
                # through the points, by another formula than Lagrange's
                fit = np.polyfit(
                    (np.array(u[-order - 1 :]) - u[i]) / (u[i] - u[i - 1]), np.eye(order + 1), order
                )
                weights = np.polyval(fit, (at - u[i]) / (u[i] - u[i - 1]))
                buffer[k] = sum(w * buffer[j] for w, j in zip(weights, known, strict=True))
    return states[-1]


@pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_official_runs(every, monkeypatch, record_property):
    """The compensated runs of the official codes, from our plan of the same run without."""
    arguments, ways, worst = official.arguments, Counter(), 0.0
    for name in ("dc_solver", "dc_solver_diffusers"):
        for case in official.cases_of(name)[::every]:
            args = arguments(case)
            ratios = args.get("dc_ratios") or ()
            if all(r == 1 for r in ratios):
                continue
            monkeypatch.setattr(
                official, "arguments", lambda case: {**arguments(case), "dc_ratios": ()}
            )
            plain = official.compile_case(case)
            monkeypatch.undo()
            plan = compensated(plain.plan, ratios, args["dc_order"])
            found = official.run(case, replace(plain, plan=plan))
            off = official.deviation(case, found)[1]
            assert off < 1e-12, f"{case['id']}: {off:.3g}"
            worst = max(worst, off)
            ways[plain.way] += 1
            if ways.total() % 8 == 0:  # the same by hand, in every row
                for ours, theirs in zip(
                    plan.canonical(), official.compile_case(case).plan.canonical(), strict=True
                ):
                    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)
    summary = f"{ways.total()} cases, {dict(ways)}, largest deviation {worst:.1e}"
    print(f"\n{summary}")
    record_property("covered", summary)
    assert ways.total() >= {1: 265, 3: 85}[every], summary


SETTINGS = [
    (fs.VP(), "noise", 2, "t", "data"),
    (fs.EDM(), "edm", 1, "lambda", "noise"),
    (fs.Flow(), "flow", 2, "t", "noise"),
    (fs.Flow(t_start=0.99), "data", 3, "lambda", "data"),
]


@pytest.mark.parametrize("setting", range(len(SETTINGS)))
def test_every_solver(setting):
    """By the definition, for all that evaluate in different places; the others are refused."""
    process, predicts, order, variable, of = SETTINGS[setting]
    model = network_for(process, predicts, MIXTURE.denoise)
    x = MIXTURE.start(4)
    done = []
    for name in DETERMINISTIC:
        plan = fs.plan(name, model, 6)
        ones = [1.0] * 6
        assert compensated(plan, ones, order, variable=variable, of=of) is plan
        ratios = [1.0] * order + [1.2, 0.7, 0.9, 1.3, 0.8][: 6 - order]
        u = [level.t if variable == "t" else level.lam for level in plan.evaluations]
        if any(len({*u[i - order : i + 1]}) <= order for i in range(order, 6)):
            with pytest.raises(ValueError, match="must be 1"):
                compensated(plan, ratios, order, variable=variable, of=of)
            continue
        run = compensated(plan, ratios, order, variable=variable, of=of)
        done.append(name)
        assert run.nfe == plan.nfe
        assert [row.exact for row in run.rows] == [row.exact for row in plan.rows]  # still checked
        assert "order" in run.about["compensated"]
        if plan.basis is None and plan.given == 1:
            start = x * plan.prior_std
            want = by_definition(plan, ratios, order, variable, of, start)
            found = final(model, run, torch.from_numpy(start))
            scale = max(1.0, np.abs(want).max())
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-9 * scale, err_msg=name)
            assert np.abs(found - final(model, plan, torch.from_numpy(start))).max() > 1e-6, name
    assert {"ddim", "dpmpp_2m", "unipc_2", "unipc_3", "ipndm_3", "deis_tab3", "bdia"} <= set(done)
    assert "heun" not in done


def test_rows_are_those_of_limits():
    """ratio 0 puts the stored one before in place of the newest, for good; nothing at 1."""
    plan = fs.plan("dpmpp_2m", fs.VP(), 5)
    run = compensated(plan, [1, 1, 1, 0, 1])
    assert run.rows[:3] == plan.rows[:3]
    assert set(run.rows[3].b) == {2}  # 3 has become 2
    assert run.rows[3].order == 1
    assert run.rows[4].b[4] == plan.rows[4].b[4]
    kept = compensated(fs.plan("unipc_2", fs.VP(), 5), [1, 1, 1, 0, 1])
    assert any(3 in row.b for row in kept.rows)  # its corrector has seen it as it was
    assert kept.origin is None


def test_modes():
    """Interpolation commutes with a basis: the same as on the elements, if all scales are equal."""
    process, shape = fs.VP(), (1, 4, 4)
    basis = Cosine(np.zeros(shape), np.array(shape), np.eye(1))
    rng = np.random.default_rng(0)
    centres = torch.from_numpy(rng.normal(size=(3, 16)))

    def network(x_in, t_in):
        level = process.level(t_in[0].item())
        flat = x_in.flatten(1)
        far = torch.cdist(flat, level.alpha * centres) ** 2
        weights = torch.softmax(-far / (2 * (level.sigma**2 + 0.01)), 1)
        return (weights @ centres).reshape(x_in.shape)

    model = fs.Denoiser(network, process, "data")
    x = torch.from_numpy(rng.normal(size=(4, *shape)))
    for of in ("data", "noise"):
        one, two = (
            compensated(
                fs.plan(fs.gaussian(2, 0.5, b, corrector=True), model, 6),
                [1, 1, 0.6, 1.4, 0.8, 1.2],
                of=of,
            )
            for b in (None, basis)
        )
        assert two.basis is not None
        np.testing.assert_allclose(final(model, one, x), final(model, two, x), atol=1e-9)


def test_refusals():
    plan = fs.plan("unipc_2", fs.Flow(), 5)
    good = [1, 1, 0.9, 0.9, 0.9]
    for bad, arguments, options in (
        ("draws noise", (fs.plan("ddpm", fs.VP(), 5), good), {}),
        ("fused", (plan.fuse(), good), {}),
        ("fused", (plan.cheapest if plan.cheapest is not plan else plan.fuse(), good), {}),
        ("already", (compensated(plan, good), good), {}),
        ("4 entries", (plan, good[:4]), {}),
        (r"ratios\[1\] = 0.9 must be 1", (plan, [1, 0.9, 1, 1, 1]), {}),
        (r"ratios\[2\] = nan", (plan, [1, 1, math.nan, 1, 1]), {}),
        (r"ratios\[2\] = 0.9 must be 1", (plan, good), {"variable": "lambda"}),  # alpha = 0
        (r"ratios\[3\] = 0.9 must be 1", (fs.plan("heun", fs.EDM(), 5), [1, 1, 1, 0.9, 1]), {}),
        ("order = 0", (plan, good, 0), {}),
        ("did you mean 'lambda'", (plan, good), {"variable": "lambd"}),
        ("accepted: data, noise", (plan, good), {"of": "x"}),
    ):
        with pytest.raises(ValueError, match=bad):
            compensated(*arguments, **options)
    model = network_for(fs.VP(), "data", MIXTURE.denoise)
    teacher = teach(model, (3,), 12, nfe=24)
    plan = fs.plan("unipc_2", model, 5)
    for bad, plan_, options in (
        ("count = 13", plan, {"count": 13}),
        ("none to check on", plan, {"count": 12}),
        ("bounds", plan, {"bounds": (1.0, 2.0)}),
        ("tries = 2", plan, {"tries": 2}),
        ("accepted: sample, trajectory", plan, {"objective": "end"}),
        ("accepted: log, square", plan, {"loss": "l2"}),
        ("at t = ", fs.plan("unipc_2", model, 5, start={"strength": 0.5}), {}),
    ):
        with pytest.raises(ValueError, match=bad):
            fit_ratios(teacher, plan_, **options)


def test_minimum():
    """The minimum, at the start, inside or at a bound, in few values, all within the bounds."""
    for f, want in (
        (lambda x: (x - 0.3) ** 2, 0.3),
        (lambda x: (x - 1) ** 4, 1.0),
        (lambda x: abs(x - 1.7), 1.7),
        (lambda x: x, 0.0),
        (lambda x: -math.exp(x), 2.0),
        (lambda x: math.log(1e-3 + (x - 0.8) ** 2), 0.8),
        (lambda x: math.inf if x < 0.9 else (x - 1.2) ** 2, 1.2),
    ):
        seen = []

        def told(x, f=f, seen=seen):
            seen.append(x)
            return f(x)

        x, value = _minimum(told, 0.0, 2.0, 1.0, 20)
        assert abs(x - want) < 0.02, (x, want)
        assert x in seen
        assert value == f(x) == min(map(f, seen))
        assert seen[0] == 1.0
        assert len(seen) <= 20
        assert min(seen) >= 0
        assert max(seen) <= 2


@pytest.fixture(scope="module")
def digits():
    model = fs.Guided(fs.models.load("digits"), 2.0, {"label": 10})
    teacher, fresh = (
        teach(model, (1, 8, 8), n, cond={"label": torch.arange(n) % 10}, seed=s)
        for n, s in ((32, 1), (64, 2))
    )
    return teacher, fresh


@pytest.mark.parametrize("solver", ["unipc_2", "dpmpp_2m"])
def test_search(digits, solver):
    """Both objectives do what they say, and what was found holds for noises it has not seen."""
    teacher, fresh = digits
    plan = fs.plan(solver, teacher.model, 6, grid="softened")
    found = fit_ratios(teacher, plan, count=10)
    fitted = teacher[:10]
    losses = {
        name: np.log(fitted.errors(compensated(plan, ratios))).mean()
        for name, ratios in {"none": [1.0] * 6, **found.found}.items()
    }
    assert losses["sample"] < losses["trajectory"] < losses["none"]
    # no single ratio does better, by a scan
    for i in range(2, 6):
        for r in np.linspace(0, 2, 9):
            tried = list(found.found["sample"])
            tried[i] = r
            errors = fitted.errors(compensated(plan, tried))
            assert np.log(errors).mean() > losses["sample"] - 0.02
    assert found.ratios == found.found["sample"]
    assert found.plan == compensated(plan, found.ratios)
    assert "compensated by sample" in found.note
    assert np.array_equal(found.before, teacher[10:].errors(plan))
    assert np.array_equal(found.after, teacher[10:].errors(found.plan))
    assert np.median(fresh.errors(found.plan)) < 0.8 * np.median(fresh.errors(plan))


def test_trajectory_takes_the_nearest_next_state(digits):
    """The first ratio of it by a scan of the corrected state, from a plan that stops there."""
    teacher, _ = digits
    plan = fs.plan("unipc_2", teacher.model, 5)
    found = fit_ratios(teacher, plan, objective="trajectory", loss="square")
    assert list(found.found) == ["trajectory"]
    fitted, times = teacher[:10], plan.times
    corrected = 6  # states: 0, 1, 1 corrected, 2, 2 corrected, 3, 3 corrected, ...
    assert times[5] == times[corrected]
    level = plan.levels[corrected]
    fine = [*np.geomspace(80, level.sigma, 60)]
    fine[0], fine[-1] = float(plan.times[0]), float(level.t)
    want = fs.sample(
        teacher.model,
        solver=fs.plan("unipc_3", teacher.model, grid=fine),
        x=fitted.x,
        cond=dict(fitted.cond),
        progress=False,
    )

    def distance(r: float) -> float:
        state = compensated(plan, [1, 1, r, 1, 1]).start(fitted.x)
        for _ in range(4):
            level = state.plan.asked(state.index)
            output = teacher.model.output(*state.query(), level, fitted.cond)
            state = state.advance(output)
        return float((state.states[corrected] - want).square().mean())

    scan = {r: distance(r) for r in np.linspace(0, 2, 81)}
    best = min(scan, key=scan.__getitem__)
    assert 0 < best < 2
    assert abs(found.ratios[2] - best) < 0.05 or scan[best] > 0.99 * distance(found.ratios[2])


def test_evaluations_are_counted():
    """By the network's own count; in trajectory mode a step without corrector costs one."""
    process, seen = fs.VP(), [0]
    model = network_for(process, "data", MIXTURE.denoise)
    inner = model.network

    def network(x, t):
        seen[0] += len(x)
        return inner(x, t)

    model = fs.Denoiser(network, process, "data")
    teacher = teach(model, (3,), 10, nfe=32, batch=3)
    for solver, objective in (
        ("dpmpp_2m", "trajectory"),
        ("unipc_2", "trajectory"),
        ("unipc_2", "sample"),
    ):
        seen[0] = 0
        plan = fs.plan(solver, model, 6)
        found = fit_ratios(teacher, plan, count=6, objective=objective, tries=5)
        assert found.evaluations == seen[0]
        if solver == "dpmpp_2m":  # the reference, one run, and two of the 4 others to check
            reference = seen[0] - 6 * 6 - 2 * 4 * 6
            assert 6 * 30 <= reference <= 6 * 40


def test_what_is_not_better_is_not_used(digits):
    """Held-out noises on which the plan is perfect as it is; a plan with nothing to choose."""
    teacher, fresh = digits
    plan = fs.plan("dpmpp_2m", teacher.model, 5)
    other = replace(fresh, samples=fresh.run(plan))
    found = fit_ratios(teacher, plan, held_out=other)
    assert found.plan is plan
    assert found.ratios == (1.0,) * 5
    assert found.found["sample"] != found.ratios
    assert found.after is found.before
    assert "kept as it is" in found.note
    heun = fs.plan("heun", teacher.model, 7)
    found = fit_ratios(teacher, heun, count=4)
    assert found.plan is heun
    assert not found.found
    assert "nowhere 3 evaluations" in found.note


@pytest.mark.parametrize("shape", [(6,), (2, 5), (2, 3, 2, 2)])
def test_shapes(shape):
    """1-D, no channel axis, video; flows; several calls per batch."""
    weight = torch.linspace(-1, 1, math.prod(shape)).reshape(shape)

    def network(x, t):
        return torch.tanh(3 * (x + weight)) - x * t.reshape(-1, *(1 for _ in shape))

    model = Counted(fs.Denoiser(network, fs.Flow(), "flow"))
    teacher = teach(model, shape, 16, nfe=48, batch=5)
    plan = fs.plan("unipc_2", model, 5)
    found = fit_ratios(teacher, plan, count=8)
    assert np.log(found.after).mean() <= np.log(found.before).mean()


#: Shipped with DC-Solver for Stable Diffusion 2.1, and what it predicts there for guidance 7.5.
SHIPPED = """
1523.67662 -1111.47465 198.38350 -1346.08900 1007.19494 -186.25476 168.39730 -128.03895 24.88479
-8140.64402 5906.74828 -1035.99411 6941.41390 -5193.98066 950.32057 -848.21047 650.69033 -121.28674
13309.27038 -9616.67032 1668.76860 -11037.10779 8256.66669 -1503.79920 1293.97404 -999.56293
188.22170 -6747.42182 4853.15305 -835.51168 5489.11518 -4096.89722 743.09535 -619.56128 480.14971
-90.89633
"""
PREDICTED = {
    5: [1, 1, 1.027, 0.739, 1.226],
    10: [1, 1, 0.445, 0.898, 1.063, 1.043, 0.941, 0.861, 0.907, 1.182],
}


def test_cascade_is_the_published_one():
    cascade = Cascade(np.array(SHIPPED.split(), dtype=float).reshape(4, 3, 3))
    for nfe, ratios in PREDICTED.items():
        np.testing.assert_allclose(cascade.predict(7.5, nfe), ratios, rtol=0, atol=6e-4)
    # and a fit to what it predicts is the same polynomial
    runs = [(w, n, cascade.predict(w, n)) for w in (2.0, 5.0, 7.5, 10.0) for n in (5, 6, 8, 10, 15)]
    again = Cascade.fit(runs)
    assert again.coefficients.shape == (4, 3, 3)
    assert not again.note
    for w, n in ((3.3, 7), (9.0, 12)):
        np.testing.assert_allclose(again.predict(w, n), cascade.predict(w, n), rtol=0, atol=1e-6)
    # outside of what it has seen it takes the nearest that it has
    assert again.predict(20.0, 8) == again.predict(10.0, 8)
    assert again.predict(5.0, 30)[29] == pytest.approx(again.predict(5.0, 15)[14])
    assert again.predict(5.0, 30)[27] == pytest.approx(again.predict(5.0, 15)[13])
    seen = [r for *_, ratios in runs for r in ratios[2:]]
    assert min(again.predict(2.0, 40)[2:]) >= min(seen)
    assert max(again.predict(2.0, 40)) <= max(seen)


def test_cascade_of_few_runs_has_fewer_terms_and_says_so():
    one = Cascade.fit([(1.0, 5, (1, 1, 0.9, 1.1, 1.3))])
    assert "2 instead of 3 in the step" in one.note
    assert "0 instead of 2 in guidance" in one.note
    assert "0 instead of 2 in the budget" in one.note
    np.testing.assert_allclose(one.predict(1.0, 5), (1, 1, 0.9, 1.1, 1.3), atol=1e-9)
    assert one.predict(7.0, 5) == one.predict(1.0, 5)
    two = Cascade.fit([(1.0, 5, (1, 1, 0.9, 1.1, 1.3)), (2.0, 5, (1, 1, 1.0, 1.0, 1.0))])
    np.testing.assert_allclose(two.predict(1.5, 5), (1, 1, 0.95, 1.05, 1.15), atol=1e-9)
    assert len(two.predict(1.5, 1)) == 1
    for bad, runs in (
        ("4 ratios for nfe = 5", [(1.0, 5, (1, 1, 0.9, 1.1))]),
        ("0 ratios after", [(1.0, 2, (1, 1))]),
        ("all finite", [(1.0, 3, (1, 1, math.nan))]),
    ):
        with pytest.raises(ValueError, match=bad):
            Cascade.fit(runs)
    with pytest.raises(ValueError, match="shape"):
        Cascade(np.zeros(36))
    with pytest.raises(ValueError, match="nfe = 0"):
        one.predict(1.0, 0)


@pytest.mark.slow
def test_cascade_predicts_a_budget_it_has_not_seen(record_property):
    """Ratios of a budget from those of others, on the trained network, on fresh noises: inside of
    the budgets most of what a search gains, above them still better than none."""
    digits, nfes, fresh, runs, plans = fs.models.load("digits"), (5, 6, 8, 10), {}, [], {}
    for scale in (1.0, 2.0, 4.0):
        model = fs.Guided(digits, scale, {"label": 10})
        teacher, fresh[scale] = (
            teach(model, (1, 8, 8), n, cond={"label": torch.arange(n) % 10}, seed=s)
            for n, s in ((26, 1), (64, 2))
        )
        for nfe in nfes:
            plans[scale, nfe] = fs.plan("dpmpp_2m", model, nfe)
            runs.append((scale, nfe, fit_ratios(teacher, plans[scale, nfe]).ratios))
    lines, gains = [], {nfe: [] for nfe in nfes}
    for scale, nfe, ratios in runs:
        cascade = Cascade.fit([run for run in runs if run[1] != nfe])
        plan, predicted = plans[scale, nfe], cascade.predict(scale, nfe)
        plain, searched, other = (
            float(np.median(fresh[scale].errors(run)))
            for run in (plan, compensated(plan, ratios), compensated(plan, predicted))
        )
        gains[nfe].append(other / plain)
        lines.append(
            f"{scale:g} {nfe}: {plain:.4f}, searched {searched:.4f}, predicted {other:.4f}"
        )
    print("\n" + "\n".join(lines))
    record_property("covered", "; ".join(lines))
    assert max(gains[6] + gains[8]) < 0.9, lines
    assert max(gains[5] + gains[10]) < 1, lines
