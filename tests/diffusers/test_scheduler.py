"""The scheduler by itself: what a config means, what a run does. Pipelines: test_pipelines.py."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch

import fewstep as fs

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

from fewstep.diffusers import Scheduler  # noqa: E402
from fewstep.diffusers._config import described  # noqa: E402

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STD = 0.5


def config(name, **settings):
    """The config of a fresh diffusers scheduler, which does not name its class."""
    return getattr(diffusers, name)(**settings).config


class Exact:
    """The exact network of a scheduler config for data N(0, STD^2), which counts its calls."""

    def __init__(self, known):
        self.known, self.calls = known, []
        self.last = None

    def __call__(self, x_in, t):
        told = float(t)
        level = self.known.process.level(self.known.time_of(told))
        p, q, c_in, c_noise = self.known.prediction.scalars(level)
        assert c_noise == pytest.approx(told, rel=1e-5, abs=1e-6)
        gain = STD**2 * level.alpha / (STD**2 * level.alpha**2 + level.sigma**2)
        self.calls.append(told)
        self.last = x_in / c_in, level
        return (gain - p) / q * (x_in / c_in)


def run(scheduler, x, nfe=None, first=0, edit=None, **kwargs):
    """What every pipeline does."""
    mu = kwargs.get("mu")
    net = Exact(described(scheduler.config, mu))
    scheduler.set_timesteps(nfe, **kwargs)
    if first:
        scheduler.set_begin_index(first)
    for i, t in enumerate(scheduler.timesteps[first:]):
        out = net(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, return_dict=False)[0]
        if edit is not None:
            x = edit(i, x)
    run.last = net.last
    return x, net.calls


def start(scheduler, shape=(3, 2, 4, 4), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.0


CONFIGS = {
    "sd": config("PNDMScheduler", **SD, steps_offset=1, skip_prk_steps=True),
    "v, zero snr": config(
        "DDIMScheduler",
        **SD,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    ),
    "sample": config("DPMSolverMultistepScheduler", prediction_type="sample"),
    "karras": config("DPMSolverMultistepScheduler", **SD, use_karras_sigmas=True),
    "exponential": config("DPMSolverMultistepScheduler", **SD, use_exponential_sigmas=True),
    "beta": config("DPMSolverMultistepScheduler", **SD, use_beta_sigmas=True),
    "lu": config("DPMSolverMultistepScheduler", **SD, use_lu_lambdas=True),
    "cosine, karras": config(
        "DPMSolverMultistepScheduler", beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True
    ),
    "cosine, beta": config(
        "DPMSolverMultistepScheduler", beta_schedule="squaredcos_cap_v2", use_beta_sigmas=True
    ),
    "sigma_min": config("DPMSolverMultistepScheduler", **SD, final_sigmas_type="sigma_min"),
    "flow": config("FlowMatchEulerDiscreteScheduler", shift=3.0),
    "flow, karras": config("FlowMatchEulerDiscreteScheduler", use_karras_sigmas=True),
    "flow, beta": config("FlowMatchEulerDiscreteScheduler", use_beta_sigmas=True),
    "flow, terminal": config("FlowMatchEulerDiscreteScheduler", shift_terminal=0.1),
    "flow of UniPC": config(
        "UniPCMultistepScheduler",
        use_flow_sigmas=True,
        flow_shift=5.0,
        prediction_type="flow_prediction",
    ),
    "edm": config("EDMDPMSolverMultistepScheduler"),
    "edm v": config("EDMEulerScheduler", prediction_type="v_prediction"),
    "audio": {  # CosineDPMSolverMultistepScheduler, which older versions make with torchsde only
        "sigma_min": 0.3,
        "sigma_max": 500,
        "sigma_data": 1.0,
        "sigma_schedule": "exponential",
        "prediction_type": "v_prediction",
        "rho": 7.0,
        "solver_order": 2,
        "final_sigmas_type": "zero",
    },
    "video": config(
        "EulerDiscreteScheduler",
        **SD,
        prediction_type="v_prediction",
        timestep_type="continuous",
        sigma_min=0.002,
        sigma_max=700.0,
        use_karras_sigmas=True,
    ),
}


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("rescale", [False, True])
def test_tables_are_those_of_diffusers(kind, rescale):
    theirs = diffusers.DDPMScheduler(beta_schedule=kind, rescale_betas_zero_snr=rescale)
    mine = Scheduler.from_config(theirs.config)
    torch.testing.assert_close(mine.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-4, atol=1e-6)


def test_laplace_table():
    try:
        theirs = diffusers.DDPMScheduler(beta_schedule="laplace")
    except NotImplementedError:
        pytest.skip("this version of diffusers does not know it")
    mine = Scheduler.from_config(theirs.config)
    torch.testing.assert_close(mine.alphas_cumprod, theirs.alphas_cumprod, rtol=2e-4, atol=1e-6)


def test_trained_betas():
    betas = np.linspace(0.001, 0.03, 50)
    theirs = diffusers.DDPMScheduler(50, trained_betas=betas)
    mine = Scheduler.from_config(theirs.config)
    torch.testing.assert_close(
        mine.alphas_cumprod, theirs.alphas_cumprod.float(), rtol=2e-4, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("nfe", [2, 3, 7, 10, 20, 50])
def test_spacings_are_those_of_diffusers(kind, name, nfe):
    offset = int(kind == "leading")
    theirs = getattr(diffusers, name)(**SD, timestep_spacing=kind, steps_offset=offset)
    mine = Scheduler.from_config(theirs.config, grid="config")
    theirs.set_timesteps(nfe)
    mine.set_timesteps(nfe)
    assert mine.timesteps.dtype == torch.int64
    assert mine.timesteps.tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("grid", [None, "config"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc_3"])
def test_every_config_converges_to_the_exact_solution(name, grid, solver):
    mine = Scheduler.from_config(CONFIGS[name], solver=solver, grid=grid)
    errors = []
    for nfe in (8, 100):
        mine.set_timesteps(nfe)
        first, end = mine.plan.levels[0], mine.plan.levels[-1]
        x = start(mine) * mine.init_noise_sigma
        sample, calls = run(mine, x, nfe)
        assert len(calls) == nfe == mine.num_inference_steps
        assert end.sigma == 0 or name in ("sd", "sigma_min")
        # at the last evaluation: what comes after is one step from sigma_min, however large it is
        state, last = run.last
        growth = np.hypot(STD * last.alpha, last.sigma) / np.hypot(STD * first.alpha, first.sigma)
        errors.append(float((state / x / growth - 1).abs().max()))
        assert torch.isfinite(sample).all()
    # A wrong reading leaves an error that stays. Orders are measured elsewhere: spacings of configs
    # with one giant last step do not show them yet.
    assert errors[1] < max(0.7 * errors[0], 1e-5), errors


def test_dynamic_shift_is_applied_once():
    flux = config("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True)
    mine = Scheduler.from_config(flux, solver="ddim")
    u = np.linspace(1.0, 1 / 5, 5)
    mine.set_timesteps(sigmas=u, mu=1.15)  # what FluxPipeline passes
    want = [*(np.exp(1.15) * u / (1 + (np.exp(1.15) - 1) * u)), 0.0]
    np.testing.assert_allclose(mine.sigmas.numpy(), want, rtol=1e-6)
    np.testing.assert_allclose(mine.timesteps.numpy(), 1000 * np.array(want[:-1]), rtol=1e-6)
    with pytest.raises(ValueError, match=r"^mu is missing"):
        mine.set_timesteps(5)
    linear = config(
        "FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, time_shift_type="linear"
    )
    mine = Scheduler.from_config(linear)
    mine.set_timesteps(sigmas=u, mu=2.0)
    np.testing.assert_allclose(mine.sigmas[1].item(), 2 * 0.8 / 1.8, rtol=1e-6)


def test_lists_come_out_as_they_went_in():
    own = [1.0, 0.77, 0.5, 0.123]
    mine = Scheduler.from_config(CONFIGS["flow"])
    mine.set_timesteps(sigmas=own)
    assert mine.sigmas.tolist() == [*torch.tensor(own).tolist(), 0.0]
    assert (
        mine.timesteps.tolist() == (1000 * torch.tensor(own, dtype=torch.float64)).float().tolist()
    )
    table = Scheduler.from_config(CONFIGS["sd"])
    table.set_timesteps(timesteps=[999, 750, 321, 4])
    assert table.timesteps.tolist() == [999, 750, 321, 4]
    own = [14.0, 6.475, 1.886, 0.4, 0.0]
    table.set_timesteps(sigmas=own)
    np.testing.assert_allclose(table.sigmas.numpy(), own, rtol=1e-6)
    ays = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029, 0.0]
    table.set_timesteps(sigmas=ays)  # published to three digits, beyond both ends
    assert len(table.timesteps) == 11
    np.testing.assert_allclose(table.sigmas.numpy(), ays, rtol=0.01)
    edm = Scheduler.from_config(CONFIGS["edm"])
    edm.set_timesteps(sigmas=[80.0, 3.0, 0.1])
    np.testing.assert_allclose(edm.sigmas.numpy(), [80.0, 3.0, 0.1, 0.0], rtol=1e-6)


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "unipc_3", "heun", "dpm_solver_3"])
@pytest.mark.parametrize("name", ["sd", "flow", "edm"])
@pytest.mark.parametrize("first", [1, 2, 3, 5])
def test_partial_runs_begin_at_their_level_and_spend_what_is_left(solver, name, first):
    mine = Scheduler.from_config(CONFIGS[name], solver=solver)
    mine.set_timesteps(6)
    rest = mine.timesteps[first:]  # the slice that pipelines keep
    x0 = torch.zeros(2, 1, 3)
    noise = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(1))
    x = mine.add_noise(x0, noise, rest[:1].repeat(2))
    mine.set_begin_index(first)
    begin = mine.plan.levels[0]
    torch.testing.assert_close(x, begin.sigma * noise)
    assert mine.plan.nfe == 6 - first
    assert rest.tolist() == mine.timesteps[first:].tolist()
    net = Exact(described(CONFIGS[name]))
    for t in rest:
        x = mine.step(net(mine.scale_model_input(x, t), t), t, x).prev_sample
    assert len(net.calls) == 6 - first
    assert mine.step_index == 6
    assert torch.isfinite(x).all()


def test_partial_run_without_begin_index_finds_its_place():
    mine = Scheduler.from_config(CONFIGS["sd"], solver="dpmpp_2m")
    x = torch.randn(2, 3)
    told, _ = run(mine, x, 6, first=2)
    net = Exact(described(CONFIGS["sd"]))
    mine.set_timesteps(6)
    for t in mine.timesteps[2:]:
        x = mine.step(net(x, t), t, x).prev_sample
    assert torch.equal(x, told)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc_2", "unipc_3", "heun", "cflow_pc2"])
def test_edits_are_respected(solver):
    """An edit moves the rest of the run as if it had always been there: for a linear network the
    change of the sample is linear in the edit, and an edit along the solution scales it."""
    mine = Scheduler.from_config(CONFIGS["flow"], solver=solver)
    x = start(mine)
    plain, _ = run(mine, x, 10)

    def scaled(by):
        def edit(i, x):
            return x * by if i == 4 else x

        return run(mine, x, 10, edit=edit)[0]

    small = (scaled(1.01) - plain).norm() / plain.norm()
    assert 0.5 * 0.01 < small < 2 * 0.01
    assert torch.equal(scaled(1.0), plain)


def test_in_place_edits_too():
    mine = Scheduler.from_config(CONFIGS["flow"], solver="dpmpp_2m")
    x = start(mine)
    copied, _ = run(mine, x, 6, edit=lambda i, x: x + 0.1 if i == 2 else x)
    placed, _ = run(mine, x, 6, edit=lambda i, x: x.add_(0.1) if i == 2 else x)
    assert torch.equal(copied, placed)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pipelines_have_a_float32_state(dtype, inference):
    """Rounding the latents at every step costs an order of magnitude; edits still count."""
    mine = Scheduler.from_config(CONFIGS["flow"], solver="dpmpp_2m")
    x = start(mine).to(dtype)

    def go(x, keep, edit=None):
        net = Exact(described(CONFIGS["flow"]))
        mine.set_timesteps(40)
        with torch.inference_mode(inference):
            for i, t in enumerate(mine.timesteps):
                shown = x.clone() if i and not keep else x
                x = mine.step(net(x, t), t, shown).prev_sample
                assert x.dtype == dtype
                if edit == i:
                    x.add_(0.25)
        return x.double()

    exact, _ = run(mine, x.double(), 40)
    kept = (go(x, True) - exact).abs().max()
    assert kept < 8 * torch.finfo(dtype).eps
    assert torch.equal(go(x, True), go(x, False))  # a copy is not an edit
    assert (go(x, True, edit=20) - exact).abs().max() > 0.05


def test_threads_have_their_own_runs():
    mine = Scheduler.from_config(CONFIGS["sd"], solver="unipc_3")
    alone = [run(mine, start(mine, seed=k), 6)[0] for k in range(8)]
    together = [torch.empty(0)] * 8
    barrier = threading.Barrier(8)

    def meet(i, x):
        barrier.wait()  # every step of one run lies between steps of the others
        return x

    def work(k):
        together[k] = run(mine, start(mine, seed=k), 6, edit=meet)[0]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_a_schedule_made_in_one_thread_runs_in_another():
    mine = Scheduler.from_config(CONFIGS["sd"])
    want, _ = run(mine, start(mine), 5)
    mine.set_timesteps(5)
    got = []

    def work():
        x, net = start(mine), Exact(described(CONFIGS["sd"]))
        for t in mine.timesteps:
            x = mine.step(net(x, t), t, x).prev_sample
        got.append(x)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert torch.equal(got[0], want)
    assert mine.step_index is None  # not this thread's run


def test_interleaved_runs_in_one_thread_are_noticed():
    mine = Scheduler.from_config(CONFIGS["sd"])
    mine.set_timesteps(5)
    x = start(mine)
    first, second = mine.timesteps[:2]
    mine.step(x, first, x)
    mine.step(x, second, x)
    with pytest.raises(ValueError, match=r"^timestep = .* in the order"):
        mine.step(x, first, x)


def test_stochastic_solvers_are_seeded_by_the_generator():
    mine = Scheduler.from_config(CONFIGS["sd"], solver="sde_dpmpp_2m")
    net = Exact(described(CONFIGS["sd"]))

    def go(generator, x):
        mine.set_timesteps(6)
        for t in mine.timesteps:
            x = mine.step(net(x, t), t, x, generator=generator).prev_sample
        return x

    x = start(mine)
    a, b, c = (go(torch.Generator().manual_seed(s), x) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    many = go([torch.Generator().manual_seed(s) for s in (5, 6, 7)], x)
    one = go([torch.Generator().manual_seed(6)], x[1:2])
    assert torch.equal(many[1:2], one)


def test_clipping_of_the_config_acts():
    clipped = Scheduler.from_config(config("DDIMScheduler", clip_sample=True), solver="ddim")
    clipped.set_timesteps(4)
    x, t = 5 * torch.ones(2, 3), clipped.timesteps[0]
    assert clipped.step(0 * x, t, x).pred_original_sample.abs().max() == 1
    free = Scheduler.from_config(config("DDIMScheduler", clip_sample=False), solver="ddim")
    free.set_timesteps(4)
    assert free.step(0 * x, t, x).pred_original_sample.abs().max() > 5


def test_learned_variances_are_dropped():
    mine = Scheduler.from_config(config("DDPMScheduler", variance_type="learned_range"))
    mine.set_timesteps(3)
    x = torch.randn(2, 3, 4)
    out = torch.cat([0.1 * x, torch.randn(2, 3, 4)], 1)
    t = mine.timesteps[0]
    a = mine.step(out, t, x).prev_sample
    mine.set_timesteps(3)
    assert torch.equal(a, mine.step(0.1 * x, t, x).prev_sample)


def test_copies_files_and_configs_give_the_same_scheduler(tmp_path):
    mine = Scheduler.from_config(CONFIGS["flow"], solver="unipc_2", grid="karras")
    x = start(mine)
    want, _ = run(mine, x, 6)
    mine.save_pretrained(tmp_path)
    others = [
        copy.deepcopy(mine),
        pickle.loads(pickle.dumps(mine)),
        Scheduler.from_config(mine.config),
        Scheduler.from_pretrained(tmp_path),
    ]
    for other in others:
        assert torch.equal(run(other, x, 6)[0], want)
    # and back: diffusers reads what it knows of the config
    back = diffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(CONFIGS["flow"]))
    assert back.config.shift == 3.0
    # a change of one entry
    assert Scheduler.from_config(mine.config, solver="ddim").config.grid == "karras"


def test_a_recipe_travels_inside(tmp_path):
    known = described(CONFIGS["sd"])
    model = fs.Denoiser(Batched(known), known.process, known.prediction)
    recipe = fs.calibrate(
        model,
        shape=(1, 4, 4),
        nfe=4,
        noises=(8, 8, 8),
        methods=["learned"],
        first_step=False,
        progress=False,
    )
    mine = Scheduler.from_config(CONFIGS["sd"], recipe=recipe)
    assert mine.config.solver is None
    x = start(mine, (2, 1, 4, 4))
    want, calls = run(mine, x, 4)
    assert len(calls) == 4
    torch.testing.assert_close(want, fs.sample(model, solver=recipe, nfe=4, x=x))
    mine.save_pretrained(tmp_path / "a")
    recipe.save(tmp_path / "r.safetensors")
    for other in (
        Scheduler.from_pretrained(tmp_path / "a"),
        Scheduler.from_config(CONFIGS["sd"], recipe=str(tmp_path / "r.safetensors")),
        Scheduler.from_config(mine.config),
    ):
        assert torch.equal(run(other, x, 4)[0], want)
    assert len(repr(mine)) < 200  # not the whole file
    with pytest.raises(ValueError, match=r"^num_inference_steps = 5; this recipe has plans for 4"):
        mine.set_timesteps(5)
    mine.set_timesteps(4)
    with pytest.raises(ValueError, match=r"^begin_index = 2: the plans of a recipe start from"):
        mine.set_begin_index(2)
    with pytest.raises(ValueError, match="made for another model"):
        Scheduler.from_config(CONFIGS["flow"], recipe=recipe).set_timesteps(4)
    with pytest.raises(ValueError, match="give one of both"):
        Scheduler.from_config(CONFIGS["sd"], recipe=recipe, solver="ddim")


def test_a_plan_for_every_class_needs_the_class(tmp_path):
    model = fs.models.load("digits")
    recipe = fs.calibrate(
        model,
        shape=(1, 8, 8),
        nfe=3,
        cond={"label": torch.tensor([1, 7])},
        each="label",
        noises=(16, 16, 16),
        methods=["learned"],
        first_step=False,
        progress=False,
    )
    mine = Scheduler.from_config(config("EDMEulerScheduler"), recipe=recipe)
    with pytest.raises(ValueError, match=r"^the condition 'label' is not known here"):
        mine.set_timesteps(3)
    with pytest.raises(ValueError, match=r"^the condition 'label' is not known here"):
        fs.generate(model, 4, tmp_path, shape=(1, 8, 8), solver=recipe, nfe=3)


class Batched(torch.nn.Module):
    """The exact network for one time per sample."""

    def __init__(self, known):
        super().__init__()
        self.known = known

    def forward(self, x, t):
        return torch.stack([Exact(self.known)(v, s) for v, s in zip(x, t, strict=True)])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Scheduler.from_config(CONFIGS["sd"], solver="unipcc"), "^solver = 'unipcc'"),
        (lambda: Scheduler.from_config(CONFIGS["sd"], grid="karas"), "^grid = 'karas'"),
        (lambda: Scheduler.from_config(CONFIGS["sd"], solvr="ddim"), "^config = 'solvr'"),
        (lambda: Scheduler.from_config("sd"), "^config = 'sd'"),
        (lambda: Scheduler.from_config({"a": 1}), "^config .* none that fewstep knows"),
        (lambda: Scheduler.from_config(config("SCMScheduler")), "^prediction_type = 'trigflow'"),
        (
            lambda: Scheduler.from_config(
                config("FlowMatchEulerDiscreteScheduler", invert_sigmas=True)
            ),
            "invert_sigmas",
        ),
        (lambda: Scheduler.from_config(CONFIGS["sd"], beta_schedule="cos"), "^beta_schedule"),
    ],
)
def test_what_it_cannot_do_is_refused_at_once(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_what_a_run_cannot_be_is_refused_before_it_starts():
    mine = Scheduler.from_config(CONFIGS["sd"])
    x = torch.randn(1, 2)
    for call in (
        lambda: mine.step(x, 3, x),
        lambda: mine.scale_model_input(x, 3),
        lambda: mine.set_begin_index(1),
    ):
        with pytest.raises(ValueError, match="call set_timesteps first"):
            call()
    for arguments, says in (
        ({}, "^num_inference_steps is missing"),
        ({"timesteps": [5, 3], "sigmas": [1.0]}, "both given"),
        ({"timesteps": [5, 5]}, "repeats"),
        ({"num_inference_steps": 3, "timesteps": [500, 5]}, "^num_inference_steps = 3 with a list"),
        ({"sigmas": [1.0, -1.0]}, "^sigmas"),
        ({"sigmas": [100.0, 1.0]}, "^sigmas: 100 is outside the range"),
        ({"num_inference_steps": 5, "mu": 1.0}, "^mu = 1.0"),
        ({"num_inference_steps": 0}, "nfe = 0"),
    ):
        with pytest.raises(ValueError, match=says):
            mine.set_timesteps(**arguments)
    mine.set_timesteps(2)
    for t in mine.timesteps:
        x = mine.step(x, t, x).prev_sample
    with pytest.raises(ValueError, match=r"^step: all 2 evaluations"):
        mine.step(x, t, x)
    mine.set_timesteps(2)
    with pytest.raises(ValueError, match=r"^timestep = 123 is not one"):
        mine.step(x, 123, x)
