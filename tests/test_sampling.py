"""The loop: budgets, truth told to the network, seeds, records, failures."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import fewstep as fs
from fewstep._sampling import DEFAULT_SOLVER
from problems import PROCESSES, Mixture, network_for, run

MIXTURE = Mixture()
SOLVERS = list(fs.solvers)


class Recorder:
    """A network that records what it is asked, answers D = 0.3 x, and may fail at call `at`."""

    def __init__(self, at: int | None = None, answer=None):
        self.calls, self.at, self.answer = [], at, answer

    def __call__(self, x, t, **cond):
        self.calls.append((x.clone(), t.clone()))
        if self.at == len(self.calls):
            return self.answer(x)
        return 0.3 * x


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["vp", "zero terminal SNR", "flow shift 3", "edm"])
def test_nfe_to_the_call_and_the_level_told_is_the_level_used(name, solver):
    process = PROCESSES[name]
    for nfe in (1, 2, 5, 9):
        for scale in (1.0, 3.0):
            network = Recorder()
            model = fs.Guided(fs.Denoiser(network, process, "data"), scale, {"c": 0.0})
            plan = fs.plan(solver, model, nfe)
            fs.sample(model, (2, 3), solver=solver, nfe=nfe, cond={"c": torch.ones(2)})
            assert len(network.calls) == nfe == plan.nfe
            for (x, t), level in zip(network.calls, plan.evaluations, strict=True):
                assert x.shape[0] == (2 if scale == 1 else 4)
                assert (t == t[0]).all()
                told = process.level(float(t[0]))
                for field in ("alpha", "sigma"):
                    want = getattr(level, field)
                    assert getattr(told, field) == pytest.approx(want, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", sorted(PROCESSES))
def test_samples_of_a_gaussian_have_its_spread_at_every_call(name):
    """What the network is given has the level it is told: std sqrt(alpha^2 c^2 + sigma^2)."""
    process, c = PROCESSES[name], 0.5
    final = "min" if process.t_clean is None else "zero"

    def denoise(x, alpha, sigma):
        return alpha * c**2 / (alpha**2 * c**2 + sigma**2) * x

    # the 50 levels of the user's table are all there are, so its last steps are coarse
    nfe, tolerance = (50, 0.05) if name == "user table" else (200, 0.02)
    plan = fs.plan("dpmpp_2m", process, nfe, final=final)
    start = process.level(process.t_start)
    x = np.random.default_rng(0).normal(size=(4000, 4)) * np.hypot(start.alpha * c, start.sigma)
    x /= x.std() / np.hypot(start.alpha * c, start.sigma)
    states = {0: x}
    for i, row in enumerate(plan.rows):
        level = plan.levels[i]
        want = np.hypot(level.alpha * c, level.sigma)
        assert states[i].std() == pytest.approx(want, rel=tolerance), (i, level)
        d = {j: denoise(states[j], plan.levels[j].alpha, plan.levels[j].sigma) for j in row.b}
        states[i + 1] = sum(v * states[j] for j, v in row.a.items()) + sum(
            v * d[j] for j, v in row.b.items()
        )


def test_sample_agrees_with_the_definition():
    denoiser = network_for(fs.VP(), "noise", MIXTURE.denoise)
    x = MIXTURE.start(5)
    got = fs.sample(denoiser, nfe=7, x=torch.from_numpy(x))
    want = run(fs.plan(DEFAULT_SOLVER, denoiser, 7), MIXTURE.denoise, x)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-10)


@pytest.mark.parametrize("predicts", fs.predictions)
@pytest.mark.parametrize("name", PROCESSES)
def test_every_prediction_on_every_process_gives_the_same_samples(name, predicts):
    process = PROCESSES[name]
    denoiser = network_for(process, predicts, MIXTURE.denoise)
    final = "min" if process.t_clean is None else "zero"
    options = {"solver": "noise_ab3", "nfe": 6, "final": final}
    alpha = float(process.alpha(process.t_start))
    if alpha == 0 and fs.predictions[predicts].needs_signal:
        with pytest.raises(ValueError, match="alpha = 0"):
            fs.sample(denoiser, (5, 3), **options)
        return
    x = MIXTURE.start(5) * float(process.sigma(process.t_start))
    plan = fs.plan(options["solver"], process, 6, final=final)
    want = run(plan, MIXTURE.denoise, x)
    got = fs.sample(denoiser, x=torch.from_numpy(x), **options).numpy()
    # noise and score say D / alpha: rounding grows as 1 / alpha
    np.testing.assert_allclose(got, want, atol=1e-12 / alpha if alpha else 1e-11, rtol=1e-9)
    single = fs.sample(denoiser, x=torch.from_numpy(x).float(), **options).numpy()
    np.testing.assert_allclose(single, want, atol=2e-5 / alpha if alpha else 1e-3)


def test_a_sample_depends_on_its_seed_and_index_alone():
    noise = fs.start_noise((8, 3, 4), 7)
    for batch in (1, 3, 8):
        parts = [fs.start_noise((min(batch, 8 - i), 3, 4), 7, first=i) for i in range(0, 8, batch)]
        assert torch.equal(torch.cat(parts), noise)
    assert torch.equal(fs.start_noise((3, 3, 4), [5, 7, 5])[1], noise[0])
    assert torch.equal(fs.start_noise((3, 3, 4), [5, 7, 5])[0], fs.start_noise((1, 3, 4), 5)[0])
    assert not torch.equal(noise, fs.start_noise((8, 3, 4), 8))
    double = fs.start_noise((8, 3, 4), 7, dtype=torch.float64)
    assert torch.equal(double.float(), noise)
    state = torch.get_rng_state()
    fs.start_noise((2, 2), 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_start_noise_is_standard_normal_and_uncorrelated():
    z = fs.start_noise((200, 2000), 0).double()
    assert abs(z.mean()) < 0.006
    assert abs(z.std() - 1) < 0.005
    assert abs((z**4).mean() - 3) < 0.06
    r = torch.corrcoef(z)
    assert r.fill_diagonal_(0).abs().max() < 0.12  # 19,900 pairs of 2,000 numbers: 5 sigma
    other = fs.start_noise((200, 2000), 1).double()
    assert torch.corrcoef(torch.stack([z.ravel(), other.ravel()]))[0, 1].abs() < 0.008


def test_samples_do_not_depend_on_the_batch():
    denoiser = network_for(fs.Flow(), "flow", MIXTURE.denoise)
    whole = fs.sample(denoiser, (6, 3), nfe=5, seed=3, dtype=torch.float64)
    parts = [
        fs.sample(denoiser, (n, 3), nfe=5, seed=3, first=i, dtype=torch.float64)
        for i, n in ((0, 1), (1, 3), (4, 2))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


def test_the_start_has_the_scale_of_the_process():
    for process, std in ((fs.EDM(), 80.0), (fs.VP(), 1.0), (fs.VE(), 50.0), (fs.Flow(), 1.0)):
        network = Recorder()
        fs.sample(fs.Denoiser(network, process, "data"), (4, 1000), nfe=1)
        assert network.calls[0][0].std().item() == pytest.approx(std, rel=0.03)


def test_records():
    denoiser = network_for(fs.EDM(), "data", MIXTURE.denoise)
    records = list(fs.steps(denoiser, (2, 3), nfe=5, solver="dpmpp_3m", grid="karras"))
    plan = fs.plan("dpmpp_3m", denoiser, 5, grid="karras")
    assert [r.nfe for r in records] == [1, 2, 3, 4, 5]
    assert [r.last for r in records] == [False] * 4 + [True]
    for r, level, following in zip(records, plan.levels, plan.levels[1:], strict=False):
        assert (r.level, r.x_level) == (level, following)
    before = torch.cat(
        [plan.start(fs.start_noise((2, 3), 0) * 80).x[None], *[r.x[None] for r in records[:-1]]]
    )
    for x, r in zip(before, records, strict=True):
        want = MIXTURE.denoise(x.double().numpy(), r.level.alpha, r.level.sigma)
        np.testing.assert_allclose(r.denoised.numpy(), want, atol=1e-5)
    final = fs.sample(denoiser, (2, 3), nfe=5, solver="dpmpp_3m", grid="karras")
    assert torch.equal(records[-1].x, final)


def test_stopping_early_and_going_on():
    network = Recorder()
    denoiser = fs.Denoiser(network, fs.VP(), "data")
    for record in fs.steps(denoiser, (2, 3), nfe=6):
        if record.nfe == 2:
            break
    assert len(network.calls) == 2
    state = record.state
    while not state.done:
        state = state.advance(network(*state.query()))
    assert torch.equal(state.x, fs.sample(denoiser, (2, 3), nfe=6))


def test_eight_threads_share_a_denoiser_and_a_plan():
    denoiser = network_for(fs.VP(), "noise", MIXTURE.denoise)
    plan = fs.plan("dpmpp_3m", denoiser, 8)
    alone = [fs.sample(denoiser, (2, 3), solver=plan, seed=s) for s in range(8)]
    got: list[list[torch.Tensor]] = [[] for _ in range(8)]

    def work(s: int) -> None:
        for _ in range(5):
            got[s].append(fs.sample(denoiser, (2, 3), solver=plan, seed=s))

    threads = [threading.Thread(target=work, args=(s,)) for s in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for s in range(8):
        assert len(got[s]) == 5
        assert all(torch.equal(x, alone[s]) for x in got[s])


@pytest.mark.parametrize("predicts", fs.predictions)
def test_no_read_from_the_device_inside_advance(predicts):
    """Nothing in a step may look at a value: on an accelerator that would stall the queue. The
    meta device has no values, so any look raises."""
    plan = fs.plan("dpmpp_3m", fs.VP(), 6, predicts=predicts)
    x = torch.empty(2, 3, device="meta")
    state = fs.State(plan, 0, {0: x}, {})
    while not state.done:
        x_in, t_in = state.query()
        assert x_in.device.type == t_in.device.type == "meta"
        assert x_in.dtype != torch.float64
        state = state.advance(x_in)


def test_no_gradients_are_recorded_by_sample_and_the_state_allows_them():
    weight = torch.nn.Parameter(torch.ones(()))
    denoiser = fs.Denoiser(lambda x, t: weight * x, fs.VP(), "data")
    assert not fs.sample(denoiser, (2, 3), nfe=3).requires_grad
    state = fs.plan("dpmpp_2m", denoiser, 3).start(torch.ones(2, 3))
    while not state.done:
        state = state.advance(denoiser.network(*state.query()))
    state.x.sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"solver": "dpmp_2m"}, "solver = 'dpmp_2m' .* did you mean 'dpmpp_2m'"),
        ({"solver": 3}, "solver = 3"),
        ({"nfe": 0}, "nfe = 0"),
        ({"nfe": None}, "nfe is missing"),
        ({"grid": [1.0, 0.2, 0.4, 0.0], "nfe": None}, "goes back toward noise"),
        ({"shape": None}, "shape is missing"),
        ({"shape": (2, 0)}, r"shape = \(2, 0\)"),
        ({"shape": (2, 3), "x": torch.zeros(3, 3)}, r"shape = \(2, 3\), but x has shape"),
        ({"x": torch.full((2, 3), torch.nan), "shape": None}, "x contains NaN"),
        ({"seed": [1, 2, 3]}, "seed has 3 entries for 2 samples"),
        ({"seed": -1}, "seed = -1"),
        ({"dtype": torch.int32}, "dtype = torch.int32"),
        ({"model": lambda x, t: x}, r"wrap your network: fewstep.Denoiser\(network"),
        ({"predicts": "noise", "process": fs.CosineVP(t_start=1.0)}, "alpha = 0"),
        ({"predicts": "score", "process": fs.Flow()}, "alpha = 0"),
    ],
)
def test_mistakes_are_refused_before_the_first_call(arguments, words):
    network = Recorder()
    arguments = {"shape": (2, 3), "nfe": 4, **arguments}
    process = arguments.pop("process", fs.VP())
    denoiser = fs.Denoiser(network, process, arguments.pop("predicts", "data"))
    model = arguments.pop("model", denoiser)
    with pytest.raises(ValueError, match=words):
        fs.sample(model, arguments.pop("shape"), **arguments)
    assert network.calls == []
    if "x" not in arguments and words != "shape is missing":
        with pytest.raises(ValueError, match=words):  # steps refuses at once, not at the first next
            fs.steps(model, (2, 0) if "shape =" in words else (2, 3), **arguments)


def test_plan_and_nfe_must_agree():
    denoiser = fs.Denoiser(Recorder(), fs.VP(), "data")
    plan = fs.plan("ddim", denoiser, 4)
    assert fs.sample(denoiser, (1, 2), solver=plan, nfe=4).shape == (1, 2)
    with pytest.raises(ValueError, match="nfe = 5, but the plan has 4"):
        fs.sample(denoiser, (1, 2), solver=plan, nfe=5)
    for more in ({"grid": "karras"}, {"final": "min"}, {"grid": [1.0, 0.0]}):
        with pytest.raises(ValueError, match="the plan has its own"):
            fs.sample(denoiser, (1, 2), solver=plan, **more)
    with pytest.raises(ValueError, match="the model says so already"):
        fs.plan("ddim", denoiser, 4, predicts="noise")
    with pytest.raises(ValueError, match="give a process or a model"):
        fs.plan("ddim", "vp", 4)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (fs.Denoiser(Recorder(), fs.Flow(), "data"), "alpha"),
        (fs.Denoiser(Recorder(), fs.VP(), "noise"), "p = 0"),
        (fs.Denoiser(Recorder(), fs.VP(), "data", time=1000.0), "c_noise"),
    ],
)
def test_a_plan_for_another_model_is_refused(other, words):
    plan = fs.plan("ddim", fs.Denoiser(Recorder(), fs.VP(), "data"), 4)
    with pytest.raises(ValueError, match=f"made for another model .{words}"):
        fs.sample(other, (1, 2), solver=plan)


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_network_that_returns_nan_is_named_with_its_call(at):
    network = Recorder(at, lambda x: x * torch.nan)
    level = fs.plan(DEFAULT_SOLVER, fs.VP(), 5).levels[at - 1]
    with pytest.raises(FloatingPointError, match=f"evaluation {at} of 5 .t = {level.t:g}"):
        fs.sample(fs.Denoiser(network, fs.VP(), "data"), (2, 3), nfe=5)
    assert len(network.calls) == at


def test_a_network_that_returns_the_wrong_shape_at_some_step():
    network = Recorder(3, lambda x: x[:, :2])
    with pytest.raises(ValueError, match=r"network returned shape \(2, 2\)"):
        fs.sample(fs.Denoiser(network, fs.VP(), "data"), (2, 3), nfe=5)


def test_progress_bar_counts_evaluations_and_shows_only_after_a_second(monkeypatch, capsys):
    from fewstep import _sampling

    bars = []

    class Bar(_sampling.tqdm):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            bars.append((self, options))

    monkeypatch.setattr(_sampling, "tqdm", Bar)
    denoiser = fs.Denoiser(Recorder(), fs.VP(), "data")
    fs.sample(denoiser, (2, 3), nfe=5)
    (bar, options), *_ = bars
    assert (bar.n, bar.total) == (5, 5)
    assert options["delay"] == 1.0
    fs.sample(denoiser, (2, 3), nfe=5, progress=False)
    assert bars[-1][0].disable
    assert capsys.readouterr().err == ""


def test_import_brings_nothing_unasked():
    code = (
        "import sys, time, torch; t = time.perf_counter(); import fewstep; "
        "print(time.perf_counter() - t); "
        "print([m for m in ('scipy', 'matplotlib', 'diffusers', 'transformers', 'k_diffusion',"
        " 'deepinv', 'ray', 'torchdiffeq', 'PIL', 'rich', 'typer', 'sklearn', 'pandas', 'skimage')"
        " if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, modules = out.stdout.split("\n")[:2]
    assert modules == "[]"
    assert float(seconds) < 5.0  # a few tenths in truth; the bound only catches a new heavy import


def test_without_an_extra_one_sentence_says_what_to_install():
    code = (
        "import sys, fewstep as fs\n"
        "for m in ('diffusers', 'deepinv', 'k_diffusion', 'ray', 'PIL'): sys.modules[m] = None\n"
        "fs.k_diffusion, fs.deepinv  # need nothing\n"
        "model = fs.models.load('digits')\n"
        "def job(**more):\n"
        "    fs.generate(model, 1, 'x', shape=(1, 8, 8), nfe=1, cond={'label': [1]}, **more)\n"
        "for call in (lambda: fs.diffusers, lambda: fs.Scheduler, lambda: job(ray=1),\n"
        "             lambda: job(format='png', pixels=(-1, 1))):\n"
        "    try: call()\n"
        "    except ImportError as error: print(str(error).splitlines()[-1])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == [
        'fewstep.diffusers needs diffusers: pip install "fewstep[diffusers]"',
        'fewstep.diffusers needs diffusers: pip install "fewstep[diffusers]"',
        'ray needs Ray Data: pip install "fewstep[ray]"',
        'pictures need Pillow: pip install "fewstep[cli]"',
    ]


@functools.cache
def half_precision_problem() -> tuple[fs.Denoiser, fs.Denoiser, torch.Tensor, torch.Tensor]:
    """An exact network, the same answering in bfloat16, starting noise, and the solution."""
    mixture = Mixture()
    exact = network_for(fs.VP(), "noise", mixture.denoise)

    def rounded(x_in: torch.Tensor, t_in: torch.Tensor) -> torch.Tensor:
        return exact.network(x_in.double(), t_in).bfloat16()

    half = fs.Denoiser(rounded, fs.VP(), "noise", dtype=torch.bfloat16)
    x = torch.from_numpy(mixture.start(48))
    fine = fs.plan("ab4", exact, 400, grid="lambda", final="min")
    return exact, half, x, fs.sample(exact, solver=fine, x=x, progress=False)


@pytest.mark.parametrize("solver", [n for n, s in fs.solvers.items() if not s.stochastic])
def test_with_a_half_precision_network_more_steps_are_better(solver):
    """The state is float32 whatever the network's type: rounding of its input and output to 8 bits
    averages out over the steps instead of adding up."""
    _, half, x, want = half_precision_problem()
    errors = []
    for nfe in (8, 20, 50):
        plan = fs.plan(solver, half, nfe, grid="lambda", final="min")
        out = fs.sample(half, solver=plan, x=x.float(), progress=False)
        assert out.dtype == torch.float32
        errors.append(float((out - want).square().mean().sqrt()))
    assert errors[0] > errors[1], errors
    # 2e-3 is half a unit of the last place of bfloat16 at 1, and all that such a network can give
    assert errors[1] > errors[2] or errors[2] < 2e-3, errors
