"""Learned plans: better than what they start from, never worse, for any process and any network."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep._calibrate._learn import (
    LOSSES,
    WHAT,
    Progress,
    _scale,
    _value,
    data_mean,
    learn,
    score,
)
from fewstep._calibrate._program import answered, longer, plan_of, program_of
from fewstep._calibrate._robustness import robustness
from fewstep._calibrate._teacher import Counted, Teacher, teach

torch.set_num_threads(1)

MIXTURE = fs.exact.Mixture(
    [0.3, 0.3, 0.4],
    [[-1.0, 0.5], [1.0, 0.2], [0.2, -1.0]],
    [0.2, 0.3, 0.25],
    labels=[0, 1, 2],
)


def _teachers(model: fs.Model, shape=(2,), count=24, cond=None, **kwargs) -> list[Teacher]:
    """To fit, to choose, and fresh."""
    out = []
    for n, first in ((count, 0), (count, 1000), (4 * count, 2000)):
        its = None if cond is None else cond(n)
        out.append(teach(model, shape, n, cond=its, first=first, nfe=48, **kwargs))
    return out


def _starts(model: fs.Model, nfe: int = 4) -> list[fs.Plan]:
    return [fs.plan(name, model, nfe) for name in ("ipndm_3", "ddim")]


def _rms(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(errors**2)))


def _no_worse(learned, starts: list[fs.Plan], held: Teacher) -> None:
    """The guarantee, computed again from the plans."""
    errors = held.errors(learned.plan)
    best = min((held.errors(run) for run in starts), key=score)
    assert np.allclose(errors, learned.errors, rtol=1e-4)
    assert np.median(errors) <= np.median(best) * (1 + 1e-4)
    assert _rms(errors) <= _rms(best) * (1 + 1e-4)


PROCESSES = {
    "EDM": (fs.EDM(), "data", None),
    "VP": (fs.VP(), "noise", None),
    "flow": (fs.Flow(), "flow", None),
    "table": (fs.DiscreteVP.scaled_linear(), "noise", None),
    "zero terminal": (fs.DiscreteVP.linear().zero_terminal_snr(), "v", None),
    "VE": (fs.VE(), "data", "lambda"),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_any_process(name: str, tmp_path) -> None:
    model = MIXTURE.denoiser(*PROCESSES[name])
    train, held, fresh = _teachers(model)
    starts = _starts(model)
    learned = learn(train, held, starts, iterations=8)
    _no_worse(learned, starts, held)
    best = min(np.median(fresh.errors(run)) for run in starts)
    assert np.median(fresh.errors(learned.plan)) < 0.5 * best
    assert learned.plan.nfe == 4
    lam = [level.lam for level in learned.plan.evaluations]
    assert max(lam) <= float(model.process.lam(model.process.t_end)) + 1e-9
    learned.plan.save(tmp_path / "plan.safetensors")
    loaded = fs.Plan.load(tmp_path / "plan.safetensors")
    assert torch.equal(
        fs.sample(model, (3, 2), solver=loaded), fs.sample(model, (3, 2), solver=learned.plan)
    )


def test_networks_that_are_told_integers_never_see_another_time() -> None:
    exact = MIXTURE.denoiser(fs.DiscreteVP.scaled_linear(), "noise")
    told: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        told.append(t)
        return exact.network(x, t)

    model = fs.Denoiser(network, exact.process, "noise")
    train, held, _ = _teachers(model)
    told.clear()
    starts = _starts(model)
    learned = learn(train, held, starts, iterations=8)
    _no_worse(learned, starts, held)
    assert learned.program is not None
    assert all(t.dtype == torch.int64 and t.min() >= 0 and t.max() <= 999 for t in told)
    times = [level.t for level in learned.plan.evaluations]
    assert times == [round(t) for t in times]
    assert learned.plan.integer_times
    assert times != [level.t for level in starts[0].evaluations]


@pytest.mark.parametrize("jacobian", ["forward", "differences"])
def test_other_jacobians(jacobian: str) -> None:
    model = MIXTURE.denoiser(fs.VP(), "v")
    train, held, fresh = _teachers(model)
    starts = _starts(model)
    if jacobian == "differences":  # and no graph

        @torch.no_grad()
        def remote(x: Tensor, t: Tensor) -> Tensor:
            return MIXTURE.denoiser(fs.VP(), "v").network(x, t)

        model = fs.Denoiser(remote, fs.VP(), "v")
        train, held, fresh = (replace(t, model=model) for t in (train, held, fresh))
    learned = learn(train, held, starts, jacobian=jacobian, iterations=5, first_step=False)
    _no_worse(learned, starts, held)
    best = min(np.median(fresh.errors(run)) for run in starts)
    assert np.median(fresh.errors(learned.plan)) < 0.6 * best
    assert (learned.gradients > 0) == (jacobian == "forward")


@pytest.mark.parametrize(("shape", "dtype"), [((5,), torch.float64), ((2, 1, 3, 2), torch.float32)])
def test_guided_models_of_any_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    size = int(np.prod(shape))
    source = np.random.default_rng(0)
    exact = fs.exact.Mixture([0.5, 0.5], source.normal(size=(2, *shape)), [0.2, 0.3], labels=[0, 1])
    model = fs.Guided(exact.denoiser(fs.EDM(), "data"), 1.5, {"label": -1})
    train, held, fresh = _teachers(
        model, shape, cond=lambda n: {"label": torch.arange(n) % 2}, dtype=dtype, batch=20
    )
    starts = _starts(model)
    learned = learn(train, held, starts, iterations=8)
    _no_worse(learned, starts, held)
    best = min(np.median(fresh.errors(run)) for run in starts)
    assert size
    assert np.median(fresh.errors(learned.plan)) < 0.7 * best
    assert learned.plan.about["conditions per evaluation"] == "2"


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("name", ["VP", "table"])
def test_restrictions_keep_what_they_do_not_free(what: str, name: str) -> None:
    model = MIXTURE.denoiser(*PROCESSES[name])
    train, held, _ = _teachers(model)
    starts = [fs.plan("ddim", model, 4)]
    learned = learn(train, held, starts, what=what, first_step=False, iterations=6)
    _no_worse(learned, starts, held)
    base, got = program_of(starts[0]), learned.program
    assert got is not None
    moved = not np.array_equal(got.times, base.times)
    assert moved == (what != "coefficients")
    assert np.allclose(got.b, base.b) == (what == "labels")
    if what == "times":
        assert starts[0].origin is not None
        again = program_of(starts[0].origin([*got.times, got.end]))
        assert np.allclose(got.b, again.b, atol=1e-9)
        assert np.allclose(got.a, again.a, atol=1e-9)


def test_nothing_but_the_best_hand_made_plan_without_iterations() -> None:
    model = MIXTURE.denoiser(fs.VP(), "v")
    train, held, _ = _teachers(model)
    starts = _starts(model)
    learned = learn(train, held, starts, iterations=0, first_step=False)
    assert learned.plan in starts
    assert learned.program is None
    assert learned.iterations == 0
    best = min((held.errors(run) for run in starts), key=score)
    assert np.array_equal(learned.errors, best)
    assert list(learned.start_errors) == ["ipndm_3 on softened_8", "ddim on softened_8"]


def test_held_out_noises_decide() -> None:
    """Fitted to the wrong samples, everything is worse on the right ones: hand-made wins."""
    model = MIXTURE.denoiser(fs.VP(), "v")
    train, held, _ = _teachers(model)
    wrong = replace(train, samples=train.samples.flip(0) + 1)
    starts = _starts(model)
    learned = learn(wrong, held, starts, iterations=6, first_step=False)
    assert learned.plan in starts


def test_choice_by_the_median() -> None:
    far, even = np.array([1.0, 1.0, 1.0, 90.0]), np.array([2.0, 2.0, 2.0, 2.0])
    assert score(far, "median") < score(even, "median")
    assert score(far) > score(even)
    model = MIXTURE.denoiser(fs.VP(), "v")
    train, held, _ = _teachers(model)
    starts = _starts(model)
    learned = learn(train, held, starts, iterations=6, choice="median", first_step=False)
    assert learned.program is not None
    tried = [value for fit in learned.progress.fits for _, value in fit.history]
    assert learned.progress.best == pytest.approx(math.log(np.median(learned.errors)), rel=1e-4)
    assert learned.progress.best == pytest.approx(min(tried))
    best = min((held.errors(run) for run in starts), key=np.median)
    assert _rms(learned.errors) <= _rms(best)


def test_cap_limits_what_rounding_is_multiplied_by() -> None:
    model = MIXTURE.denoiser(fs.VP(), "v")
    train, held, _ = _teachers(model)
    starts = [fs.plan("ddim", model, 4)]
    free, capped = (
        learn(train, held, starts, iterations=10, first_step=False, cap=cap) for cap in (100.0, 1.1)
    )
    assert free.program is not None
    assert capped.program is not None
    limit = 1.1 * program_of(starts[0]).gain
    assert free.program.gain > limit >= capped.program.gain
    _no_worse(capped, starts, held)


def test_resumed_is_the_same_as_uninterrupted() -> None:
    model = MIXTURE.denoiser(fs.Flow(), "flow")
    train, held, _ = _teachers(model)
    starts = _starts(model)

    class Halt(BaseException):
        pass

    def stop_at(count: int):
        def each(progress: Progress) -> None:
            saved.append(pickle.dumps(progress))
            if len(saved) == count:
                raise Halt

        return each

    whole = learn(train, held, starts, iterations=8)
    saved: list[bytes] = []
    for count in (3, 12, 30):
        saved = saved[: count - 1]
        progress = pickle.loads(saved[-1]) if saved else None
        with pytest.raises(Halt):
            learn(train, held, starts, iterations=8, each=stop_at(count), resume=progress)
    resumed = learn(train, held, starts, iterations=8, resume=pickle.loads(saved[-1]))
    assert resumed.plan == whole.plan
    assert resumed.name == whole.name
    assert resumed.iterations == whole.iterations
    assert np.array_equal(resumed.errors, whole.errors)
    # Running the program at hand again is all that an interruption costs.
    assert whole.evaluations <= resumed.evaluations <= 1.3 * whole.evaluations


def test_budgets() -> None:
    model = Counted(MIXTURE.denoiser(fs.VP(), "v"))
    train, held, _ = _teachers(model)
    starts = _starts(model)
    model.evaluations = 0
    ticks: list[int] = []
    learned = learn(
        train, held, starts, evaluations=20_000, each=lambda p: ticks.append(p.evaluations)
    )
    assert 15_000 < learned.evaluations < 30_000  # the iteration at hand is finished
    assert ticks == sorted(ticks)
    assert ticks[-1] <= learned.evaluations
    timed = learn(train, held, starts, budget=0.3)
    assert timed.seconds < 3
    _no_worse(timed, starts, held)


def test_what_a_budget_leaves_goes_to_other_starts_and_around_the_best() -> None:
    model = MIXTURE.denoiser(fs.EDM(), "data")
    train, held, _ = _teachers(model, count=48)
    starts = [fs.plan(name, model, 4) for name in ("ipndm_3", "ddim", "flow_ab2")]
    made = learn(train, held, starts, evaluations=600_000, iterations=14, jacobian="differences")
    fits = made.progress.fits
    assert all(fit.iterations > 12 or fit.done for fit in fits if fit.kind == "start")
    shaken = [fit for fit in fits if fit.kind == "shaken"]
    assert shaken
    for fit in shaken[:3]:
        best = min(value for f in fits if f.loss == fit.loss for value, _ in f.history)
        assert 0.05 < fit.history[0][0] - best < 8  # near the best, and not at it
        assert fit.history[-1][0] < fit.history[0][0]
    _no_worse(made, starts, held)


def test_a_free_first_step_saves_an_evaluation() -> None:
    """From pure noise the network says the mean of the data, no more: with that evaluation spent
    elsewhere, a start is better before anything is fitted."""
    exact = fs.exact.Gaussian([0.5, -0.3, 0.2], [0.05, 0.02, 0.04])
    model = exact.denoiser(fs.EDM(), "data")
    train, held, _ = _teachers(model, (3,))
    assert np.allclose(data_mean(train), [0.5, -0.3, 0.2], atol=1e-3)
    starts = [fs.plan("ipndm_3", model, 3)]
    learned = learn(train, held, starts, iterations=1)
    plain, first = learned.progress.fits[:2]
    assert first.first_step
    assert not plain.first_step
    assert first.history[0][1] < plain.history[0][1] - 1  # median and root mean square, in logs
    assert first.best is not None
    assert first.best.first_step
    assert learned.plan.nfe == 3
    # Starts may be given with the evaluation that is saved.
    again = learn(train, held, [*starts, fs.plan("ipndm_3", model, 4)], iterations=1)
    assert np.allclose(again.errors, learned.errors)


@pytest.mark.parametrize("name", ["EDM", "table"])
@pytest.mark.parametrize("jacobian", ["reverse", "differences"])
def test_bands_follow_every_direction(name: str, jacobian: str) -> None:
    """Of a Gaussian every direction has its own linear equation, which numbers per band follow more
    closely than the same for all."""
    gaussian = fs.exact.Gaussian(np.linspace(-1, 1, 12), np.geomspace(9, 1e-3, 12))
    model = gaussian.denoiser(*PROCESSES[name])
    train, held, _ = _teachers(model, (12,), count=64)
    start = learn(train, held, _starts(model, 2), jacobian=jacobian, iterations=40)
    wide = learn(
        train, held, [start.plan], guards=_starts(model, 2), bands=4, jacobian=jacobian,
        iterations=60, first_step=False,
    )  # fmt: skip
    assert wide.plan.basis is not None
    assert wide.plan.nfe == 2
    assert np.median(wide.errors) < np.median(start.errors) / 2
    _no_worse(wide, [start.plan], held)
    # A start that is better than all guards is what is left where nothing was fitted.
    same = learn(
        train, held, [start.plan], guards=_starts(model, 2), bands=4, jacobian=jacobian,
        iterations=0, first_step=False,
    )  # fmt: skip
    assert score(same.errors) <= score(start.errors)


@pytest.mark.parametrize("first_step", [False, True])
@pytest.mark.parametrize("name", PROCESSES)
def test_evaluations_put_into_a_shorter_plan_change_nothing_at_first(
    name: str, first_step: bool
) -> None:
    model = MIXTURE.denoiser(*PROCESSES[name])
    process = model.process
    train, held, _ = _teachers(model)
    short = program_of(fs.plan("ddim", model, 4))
    if first_step:
        short = answered(short, data_mean(train))
    plain = held.run(plan_of(short, model))
    for nfe in (short.nfe + 1, short.nfe + 3):
        made = longer(short, process, nfe, model.rounds)
        assert len(made) == short.nfe + first_step
        for program in made:
            assert program.nfe == nfe
            lams = [float(process.lam(t)) for t in program.times]
            assert lams == sorted(lams)
            assert lams[0] == -math.inf or process.lam_start <= lams[0]
            assert lams[-1] <= float(process.lam(process.t_end)) + 1e-9
            assert not model.rounds or all(t == round(t) for t in program.times)
            run = plan_of(program, model)
            assert run.nfe == nfe
            assert torch.equal(held.run(run), plain) or torch.allclose(
                held.run(run), plain, rtol=1e-5, atol=1e-5
            )
    with pytest.raises(ValueError, match=f"nfe = {short.nfe}; need more"):
        longer(short, process, short.nfe)


def test_a_shorter_learned_plan_is_a_start() -> None:
    """Evaluations that nothing uses come into use: as good as the shorter plan, and better."""
    model = MIXTURE.denoiser(fs.EDM(), "data")
    train, held, _ = _teachers(model, count=48)
    short = learn(train, held, _starts(model, 3), iterations=20)
    guards = _starts(model, 5)
    made = learn(train, held, [short.plan], nfe=5, guards=guards, iterations=20)
    assert made.plan.nfe == 5
    assert made.name.startswith("plan for 3, 2 more at")
    tried = [fit.iterations for fit in made.progress.fits if fit.kind == "longer"]
    assert len(tried) == 3 + short.program.first_step
    assert sorted(tried)[:-2] == [1] * (len(tried) - 2)  # one step each, then the best two
    assert score(made.errors) < score(short.errors) - 0.3
    _no_worse(made, guards, held)
    for budget in (1, 3000, 20_000):  # also where it ends in the middle of the first steps
        made = learn(train, held, [short.plan], nfe=5, guards=guards, evaluations=budget)
        _no_worse(made, guards, held)


def test_the_median_loss_lets_go_of_what_is_far_off() -> None:
    """Its scale is that of most samples, and it does not pull at the others."""
    s = np.geomspace(0.5, 2.0, 41)
    far = np.concatenate([s, np.full(10, 1e6)])
    assert _scale(s) == pytest.approx(1.0)
    assert _scale(7 * s) == pytest.approx(7.0)
    assert _scale(far) < 1.5
    _, weights = _value(far, "median")
    pull = weights * far
    assert pull[41:].sum() < 1e-6 * pull[:41].sum()


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_are_the_derivative_of_the_loss(loss: str) -> None:
    s = np.geomspace(0.01, 100.0, 31)
    value, weights = _value(s, loss)
    for i in (0, 15, 20, 30):
        moved = s.copy()
        moved[i] *= 1 + 1e-5
        slope = (_value(moved, loss)[0] - value) / (1e-5 * s[i])
        assert weights[i] / len(s) == pytest.approx(slope, rel=1e-3, abs=1e-9)


def test_guards_are_not_fitted_and_not_beaten_by() -> None:
    model = MIXTURE.denoiser(fs.VP(), "v")
    train, held, _ = _teachers(model)
    start, guard = fs.plan("ddim", model, 4), fs.plan("dpmpp_3m", model, 4)
    learned = learn(train, held, [start], guards=[guard], iterations=4, first_step=False)
    assert list(learned.start_errors) == ["ddim on softened_8", "dpmpp_3m on softened_8"]
    assert all(fit.name.startswith("ddim") for fit in learned.progress.fits)
    ours, theirs = learned.errors, held.errors(guard)
    assert np.median(ours) <= np.median(theirs)
    assert _rms(ours) <= _rms(theirs)
    # Where no fit is better, the guard is what is left.
    none = learn(train, held, [start], guards=[guard], iterations=0, first_step=False)
    assert none.program is None
    assert np.array_equal(none.errors, theirs)
    # Starts of N + 1 evaluations alone: their first is answered by the mean.
    longer = learn(train, held, [fs.plan("ddim", model, 5)], guards=[guard], iterations=2)
    assert [fit.first_step for fit in longer.progress.fits[:1]] == [True]
    assert longer.plan.nfe == 4


def test_robustness() -> None:
    exact = MIXTURE.denoiser(fs.VP(), "v")
    model = fs.Guided(exact, 1.5, {"label": -1})
    train, held, fresh = _teachers(model, cond=lambda n: {"label": torch.arange(n) % 3})
    starts = _starts(model)
    learned = learn(train, held, starts, iterations=8)
    found = robustness(learned.plan, starts, fresh, scales=[1.0, 3.0])
    assert found["as it is"].ratio < 0.7
    assert found["as it is"].errors.shape == (len(fresh),)
    assert np.median(found["bfloat16"].errors) > np.median(found["float16"].errors)
    for name, size in (("output noise 2^-8", 2.0**-8), ("output noise 2^-11", 2.0**-11)):
        gain = np.median(found[name].errors) - np.median(found["as it is"].errors)
        assert gain < 4 * size * learned.plan.canonical()[1].__abs__().sum()
    assert {"guidance 1", "guidance 3"} <= found.keys()
    with pytest.raises(ValueError, match="not Guided"):
        robustness(learned.plan, starts, replace(fresh, model=exact), scales=[2.0])


def test_refusals() -> None:
    model = MIXTURE.denoiser(fs.VP(), "v")
    train, held, _ = _teachers(model, count=4)
    starts = _starts(model)
    for kwargs, text in (
        ({"loss": "log2"}, "loss = 'log2'"),
        ({"choice": "rms"}, "choice = 'rms'"),
        ({"what": "time"}, "did you mean 'times'"),
        ({"jacobian": "backward"}, "jacobian = 'backward'"),
        ({"probes": 0}, "probes = 0"),
    ):
        with pytest.raises(ValueError, match=text):
            learn(train, held, starts, **kwargs)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="starts is empty"):
        learn(train, held, [])
    with pytest.raises(ValueError, match=r"starts have \[4, 6\] evaluations"):
        learn(train, held, [*starts, fs.plan("ddim", model, 6)])
    with pytest.raises(ValueError, match=r"starts have \[4\] evaluations; need N = 5"):
        learn(train, held, starts, nfe=5, guards=_starts(model, 5), what="times")
    with pytest.raises(ValueError, match=r"guards have \[\] evaluations; need 5, and at least one"):
        learn(train, held, starts, nfe=5)
    for bands, what in ((0, "all"), (3, "times")):
        with pytest.raises(ValueError, match=f"bands = {bands} with what = '{what}'; need 1"):
            learn(train, held, starts, bands=bands, what=what)
    with pytest.raises(ValueError, match=r"guards have \[5\] evaluations; need 4"):
        learn(train, held, starts, guards=_starts(model, 5))


# What it is for. Bests of all deterministic solvers on all grids, chosen on the fresh noises
# themselves: (median, root mean square).

_BEST = {
    ("trained", 5): (0.0232, 0.0268),
    ("trained", 8): (0.0081, 0.0092),
    ("digits", 5): (0.0134, 0.136),
    ("mixture", 5): (0.0165, 0.178),
}


def _model(name: str) -> tuple[fs.Model, tuple[int, ...], int]:
    if name == "trained":
        return fs.models.load("digits"), (1, 8, 8), 10
    if name == "digits":
        return fs.exact.digits().denoiser(fs.EDM()), (1, 8, 8), 0
    source = torch.Generator().manual_seed(1)
    means = torch.randn(32, 16, generator=source, dtype=torch.float64)
    return fs.exact.Mixture(torch.ones(32) / 32, means, [0.01] * 32).denoiser(fs.EDM()), (16,), 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "nfe"), _BEST)
def test_quality(name: str, nfe: int) -> None:
    model, shape, classes = _model(name)

    def of(count: int, first: int) -> Teacher:
        cond = {"label": torch.arange(first, first + count) % classes} if classes else None
        return teach(model, shape, count, cond=cond, first=first, nfe=96)

    train, held, fresh = of(256, 0), of(128, 1000), of(512, 2000)
    solvers = ("ipndm_3", "cflow_pc2", "flow_ipndm_2")
    starts = [fs.plan(solver, model, nfe) for solver in solvers]
    learned = learn(train, held, starts, budget=120 if name == "digits" else 60)
    median, rms = np.median(fresh.errors(learned.plan)), _rms(fresh.errors(learned.plan))
    best = _BEST[name, nfe]
    factor = {"trained": (3.0, 2.2), "digits": (8.0, 1.5), "mixture": (15.0, 1.5)}[name]
    assert median < best[0] / factor[0]
    assert rms < best[1] / factor[1]
