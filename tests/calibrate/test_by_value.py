"""One plan for every value of a condition: picked by value, side by side, saved, refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._calibrate import _calibrate
from fewstep._calibrate._by_value import PlansByValue, values_of
from fewstep._calibrate._calibrate import calibrate
from fewstep._calibrate._program import answered, asking, plan_of, program_of
from fewstep._calibrate._recipe import Recipe, as_it_is
from fewstep._calibrate._teacher import Counted, teach

RNG = np.random.default_rng(0)
#: Two components per label, labels apart from each other.
MEANS = np.repeat([[-2.0, 0.5, 0.1], [1.7, 0.2, -1.4], [0.1, -1.9, 2.6]], 2, axis=0)
MODEL = fs.exact.Mixture(
    np.full(6, 1 / 6),
    MEANS + 0.5 * RNG.normal(size=MEANS.shape),
    [0.1] * 6,
    labels=[0, 0, 1, 1, 2, 2],
).denoiser(fs.EDM())
LABELS = torch.tensor([2, 0, 0, 1, 2, 1])


def named(x, t, style):
    """The same model, told strings."""
    label = torch.tensor([int(s[-1]) for s in style])
    return MODEL.network(x, t, label=label)


STYLES = fs.Denoiser(named, MODEL.process, MODEL.prediction)


def fitted(folder, **more) -> Recipe:
    return calibrate(
        MODEL,
        (3,),
        2,
        cond={"label": torch.tensor([1, 0, 2])},
        methods=("learned",),
        noises=(16, 12, 12),
        resume=folder,
        progress=False,
        **more,
    )


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def made(parts) -> Recipe:
    return fitted(parts, each="label")


def long_and_folded(label: int, nfe: int) -> tuple[fs.Plan, fs.Plan, np.ndarray]:
    """A plan, and the same with its first answer known."""
    run = fs.plan("ipndm_3", MODEL, nfe + 1)
    mean = MEANS[2 * label] + 0.01
    return run, plan_of(answered(program_of(run), mean), MODEL), mean


def test_there_is_a_plan_for_every_value_and_no_sample_loses(made: Recipe) -> None:
    teacher = teach(MODEL, (3,), 36, cond={"label": torch.arange(36) % 3}, first=500, seed=1)
    for nfe in made.nfes:
        chosen = made.chosen(nfe)
        assert (chosen.kind, chosen.name) == ("each", "one plan per label")
        plans = made.plans[nfe]
        assert isinstance(plans, PlansByValue)
        assert list(plans.plans) == [1, 0, 2]
        assert {run.nfe for run in plans.plans.values()} == {plans.nfe} == {nfe}
        shared = next(c for c in made.candidates if (c.nfe, c.kind) == (nfe, "learned"))
        assert chosen.evaluations > shared.evaluations
        assert chosen.held < shared.held < made.best_uncalibrated(nfe).held
        # The report's errors are those of a run, every sample with its own plan.
        assert np.median(teacher.errors(plans)) < made.best_uncalibrated(nfe).median
    text = str(made)
    assert "NFE 2: one plan per label, median error" in text


def test_a_mixed_batch_is_what_its_samples_are_alone(made: Recipe) -> None:
    cond = {"label": LABELS}
    whole = fs.sample(MODEL, (6, 3), solver=made, nfe=2, cond=cond, progress=False)
    for i in range(6):
        cond = {"label": LABELS[i : i + 1]}
        one = fs.sample(MODEL, (1, 3), solver=made, nfe=2, cond=cond, first=i, progress=False)
        assert torch.allclose(one[0], whole[i], atol=1e-5)
    *_, last = fs.steps(MODEL, (6, 3), solver=made, nfe=2, cond={"label": LABELS},
                        hook=lambda D, level: D)  # fmt: skip
    assert torch.allclose(last.x, whole, atol=1e-5)


def test_one_value_for_all_is_its_plan_as_it_is(made: Recipe) -> None:
    plans = made.plans[2]
    assert isinstance(plans, PlansByValue)
    for label in (1, torch.tensor(1), torch.ones(4, dtype=torch.int32), [1, 1], np.array([1])):
        assert made.plan_for(MODEL, 2, {"label": label}) is plans.plans[1]


def test_files(made: Recipe, tmp_path) -> None:
    made.save(tmp_path / "r")
    read = Recipe.load(tmp_path / "r")
    assert read.plans == made.plans
    assert list(read.plans[2].plans) == [1, 0, 2]
    assert (str(read), read.to_bytes()) == (str(made), made.to_bytes())


def test_parts_are_gone_on_from(made: Recipe, parts) -> None:
    (parts / "each-2.safetensors").unlink()
    assert fitted(parts, each="label").plans == made.plans
    with pytest.raises(ValueError, match="parts of another calibration"):
        fitted(parts)


def test_what_has_no_plan_is_refused_before_the_first_call(made: Recipe) -> None:
    model = Counted(MODEL)
    for cond, said in (
        ({"label": torch.tensor([0, 1, 7])}, "label = 7; there are plans for 1, 0, 2"),
        ({}, "the condition 'label' is not known here"),
        ({"label": torch.tensor([0.0, 1.0, 2.0])}, "one integer or one string per sample"),
        ({"label": torch.eye(3, dtype=torch.int64)}, "one integer or one string per sample"),
    ):
        with pytest.raises(ValueError, match=said):
            fs.sample(model, (3, 3), solver=made, nfe=2, cond=cond, progress=False)
    with pytest.raises(ValueError, match="the condition 'label' is not known here"):
        made.one(2)
    assert model.evaluations == 0
    with pytest.raises(ValueError, match="6 levels along axis -2"):
        fs.sample(model, (3, 3), solver=made, nfe=2, cond={"label": LABELS}, progress=False)
    assert model.evaluations == 2  # who it is


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"each": "class"}, "each = 'class'"),
        ({"methods": ("search",)}, "put 'learned' into methods"),
        ({"cond": {"label": torch.tensor([1, 1])}}, "one value of it, 1"),
        ({"cond": {"label": torch.rand(3)}}, "one integer or one string per sample"),
    ],
)
def test_bad_arguments(change, said: str) -> None:
    arguments = {"cond": {"label": torch.arange(3)}, "each": "label", **change}
    with pytest.raises(ValueError, match=said):
        calibrate(MODEL, (3,), 4, progress=False, **arguments)


def test_strings() -> None:
    styles = ["style 0", "style 2"]
    plans = {
        style: long_and_folded(int(style[-1]), 3)[1]
        for style in styles
    }  # fmt: skip
    run = PlansByValue("style", plans).plan({"style": [styles[1], styles[0], styles[1]]}, 2)
    x = fs.start_noise((3, 3), 0) * 80
    got = fs.sample(STYLES, solver=run, x=x, cond={"style": [styles[1], styles[0], styles[1]]})
    for i, style in enumerate((styles[1], styles[0], styles[1])):
        alone = fs.sample(STYLES, solver=plans[style], x=x[i : i + 1], cond={"style": [style]})
        assert torch.allclose(got[i], alone[0], atol=1e-5)
    assert values_of("style", styles) == styles
    assert values_of("style", "style 1") == ["style 1"]


@pytest.mark.parametrize("label", [0, 1])
def test_a_folded_plan_is_the_long_one_with_its_first_answer_forced(label: int, tmp_path) -> None:
    run, folded, mean = long_and_folded(label, 4)
    assert folded.nfe == run.nfe - 1
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 80
    cond = {"label": torch.full((5,), label)}

    def forced(D: torch.Tensor, level) -> torch.Tensor:
        return torch.from_numpy(mean).expand_as(D) if level.t == 80 else D

    want = fs.sample(MODEL, solver=run, x=x, cond=cond, hook=forced, progress=False)
    folded.save(tmp_path / "p")
    for form in (folded, folded.fuse(), fs.Plan.load(tmp_path / "p")):
        got = fs.sample(MODEL, solver=form, x=x, cond=cond, progress=False)
        assert torch.allclose(got, want, rtol=1e-11, atol=1e-11)
    # And back: the same plan again, whatever multiple of the mean its file has as its constant.
    again = plan_of(asking(program_of(folded), mean, 80.0), MODEL)
    for mine, theirs in zip(again.canonical(), run.canonical(), strict=True):
        assert np.allclose(mine, theirs, atol=1e-12)
    with pytest.raises(ValueError, match="its first step is not free"):
        asking(program_of(run), mean, 80.0)


def test_folded_plans_side_by_side() -> None:
    """Constants of every member's own, beside a member without any."""
    members = [long_and_folded(0, 4)[1], fs.plan("dpmpp_2m", MODEL, 4), long_and_folded(2, 4)[1]]
    label = torch.tensor([0, 1, 2])
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 80
    run = fs.stacked(members, axis=-2)
    alone = [
        fs.sample(MODEL, solver=p, x=x[i : i + 1], cond={"label": label[i : i + 1]})
        for i, p in enumerate(members)
    ]
    for form in (run, run.fuse()):
        got = fs.sample(MODEL, solver=form, x=x, cond={"label": label}, progress=False)
        assert torch.allclose(got, torch.cat(alone), atol=1e-11)
    with pytest.raises(ValueError, match="number 0 adds constants that run along axis -1"):
        fs.stacked(members, axis=-1)


def test_the_commands(tmp_path, monkeypatch, capsys) -> None:
    from fewstep._commands import app

    monkeypatch.chdir(tmp_path)
    base = ["--methods", "learned", "--nfe", "2", "--noises", "4,4,2", "--budget", "1"]
    app(["calibrate", *base, "--each-class", "--out", "r"], standalone_mode=False)
    assert "saved to r" in capsys.readouterr().out
    app(["sample", "--recipe", "r", "--guidance", "1", "--count", "6", "--out", "s.png"],
        standalone_mode=False)  # fmt: skip
    assert "6 samples of digits" in capsys.readouterr().out
    (tmp_path / "unlabelled.py").write_text(
        "import fewstep as fs\nmodel = fs.exact.Gaussian([0.0, 1.0], 0.3).denoiser(fs.EDM())\n"
    )
    with pytest.raises(ValueError, match="unlabelled:model has no classes here"):
        app(["calibrate", *base, "--each-class", "--model", "unlabelled:model", "--shape", "2"],
            standalone_mode=False)  # fmt: skip


@pytest.mark.slow
def test_quality_of_a_plan_per_class() -> None:
    # Median and root mean square of the best of all deterministic solvers on all grids, chosen on
    # 512 fresh noises; other numbers of evaluations are in benchmarks/calibrate.py.
    nfe, median, rms = 5, 0.0232, 0.0268
    model = fs.models.load("digits")
    made = calibrate(
        model,
        (1, 8, 8),
        nfe,
        cond={"label": torch.arange(10)},
        each="label",
        methods=("learned",),
        noises=(2000 // nfe, 110, 2),
        seed=1,
        progress=False,
    )
    label = torch.arange(512) % 10
    fresh = teach(model, (1, 8, 8), 512, cond={"label": label}, first=2000, nfe=96)
    errors = fresh.errors(made.plans[nfe])
    assert np.median(errors) < median / 4
    assert np.sqrt(np.mean(errors**2)) < rms / 2.6
    for k in range(10):  # nor does a class lose
        plain = fresh[(label == k).nonzero()[:, 0].tolist()]
        best = as_it_is(model, nfe, made.best_uncalibrated(nfe).name)
        assert np.median(errors[label == k]) < np.median(plain.errors(best)) / 2


def test_first_step_is_that_of_every_fit(monkeypatch):
    """A host that hands its noise to the network cannot take a free step for any value."""
    asked, real = [], _calibrate.learn

    def learn(*args, first_step=True, **more):
        asked.append(first_step)
        return real(*args, first_step=first_step, **more)

    monkeypatch.setattr(_calibrate, "learn", learn)
    fs.calibrate(
        fs.models.load("digits"),
        (1, 8, 8),
        nfe=2,
        cond={"label": torch.tensor([1, 7])},
        each="label",
        noises=(8, 8, 8),
        methods=["learned"],
        first_step=False,
        progress=False,
    )
    assert asked == [False] * 3  # the plan for all, and one for each value
