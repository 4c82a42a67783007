"""k-diffusion's convention: every solver through it, and agreement with k-diffusion itself, from
its package where that is installed and from golden values of it everywhere."""

from __future__ import annotations

import importlib
import inspect
import math
import pickle
import subprocess
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from itertools import pairwise

import pytest
import torch

import fewstep as fs
import official
import official_stochastic as noisy
from fewstep import k_diffusion as K

LIST = torch.tensor([14.6, 7.0, 3.0, 1.2, 0.5, 0.2, 0.03, 0.0])
FLOW = torch.tensor([1.0, 0.97, 0.9, 0.75, 0.5, 0.2, 0.05, 0.0])
#: data of two pixels, a mixture; the exact denoiser
MIXTURE = official.mixture("G1")


def model(x, sigma, seen=None):
    if seen is not None:
        seen.append((x.clone(), sigma.clone()))
    assert sigma.shape == x.shape[:1]
    assert bool((sigma == sigma[0]).all())
    return MIXTURE.predict(x, 1.0, float(sigma[0]))[0]


def flow_model(x, sigma, seen=None):
    if seen is not None:
        seen.append((x.clone(), sigma.clone()))
    s = float(sigma[0])
    return MIXTURE.predict(x, 1.0 - s, s)[0]


def start(sigmas=LIST, count=6, dtype=torch.float64):
    return fs.start_noise((count, 2), 7, dtype=dtype) * sigmas[0].to(dtype)


# -- the convention ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(fs.solvers))
def test_every_solver_follows_the_convention(name):
    """One callback for each step, at its start; the result is that of `fewstep.sample`."""
    sample = getattr(K, f"sample_{name}")
    for sigmas, asked, process in (
        (LIST, model, None),
        (LIST[:-1], model, None),
        (FLOW, flow_model, fs.Flow()),
    ):
        calls, seen = [], []
        x = start(sigmas)
        extra = {"seed": 3, "seen": seen} if fs.solvers[name].stochastic else {"seen": seen}
        network = (lambda x, s, seed, seen, f=asked: f(x, s, seen)) if "seed" in extra else asked
        out = sample(network, x, sigmas, extra, calls.append, True, process=process)
        assert [c["i"] for c in calls] == list(range(len(sigmas) - 1))
        given = {(s[0].item(), tuple(x[0].tolist())) for x, s in seen}
        for c in calls:
            assert set(c) == {"x", "i", "sigma", "sigma_hat", "denoised"}
            assert c["sigma"] == sigmas[c["i"]]
            churned = "churn" in name and 0.05 <= c["sigma"] <= 50 and c["i"] > 0
            assert (c["sigma_hat"] > c["sigma"]) == churned or process
            assert c["sigma_hat"] >= c["sigma"]
            # where the network was asked, and what it said
            assert any(abs(s - c["sigma_hat"]) < 1e-6 for s, _ in given)
            assert tuple(c["x"][0].tolist()) in {at for _, at in given}
            told = torch.full((len(x),), float(c["sigma_hat"]), dtype=torch.float64)
            torch.testing.assert_close(c["denoised"], asked(c["x"], told), rtol=1e-5, atol=1e-6)
        assert out.dtype == torch.float64
        levels = [float(s) for s in sigmas]
        path = process or fs.EDM(min(s for s in levels if s), levels[0])
        plan = fs.plan(name, path, grid=levels)
        assert len(seen) == plan.nfe
        denoiser = fs.Denoiser(lambda x, t, f=asked: f(x, t), path, "data")
        torch.testing.assert_close(
            out,
            fs.sample(denoiser, solver=plan, x=x, seed=3, progress=False),
            rtol=1e-12,
            atol=1e-12,
        )


def test_one_step():
    x, top = start(), float(LIST[0])
    for name in fs.solvers:
        out = getattr(K, f"sample_{name}")(
            lambda x, s, seed: model(x, s), x, LIST[[0, -1]], {"seed": 3}, disable=True
        )
        path = fs.EDM(top / 2, top)
        denoiser = fs.Denoiser(model, path, "data")
        plan = fs.plan(name, path, grid=[top, 0.0])
        wanted = fs.sample(denoiser, solver=plan, x=x, seed=3, progress=False)
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)
    out = K.sample_ddim(model, x, LIST[[0, -1]], disable=True)
    torch.testing.assert_close(out, model(x, LIST[:1].expand(6)), rtol=1e-12, atol=1e-12)


def test_a_list_is_compiled_once(monkeypatch):
    """Else a run of a small network would be compilation for the most part."""
    compiled, real = [], K.plan
    monkeypatch.setattr(K, "plan", lambda *a, **k: compiled.append(a) or real(*a, **k))
    sample, x = K.sampler(fs.exponential(3)), start()
    for sigmas in (LIST, LIST.clone(), LIST * 0.9, LIST):
        sample(model, x, sigmas, disable=True)
    assert len(compiled) == 2


def test_names():
    assert set(dir(K)) == {
        "get_sigmas",
        "sampler",
        "sample_lms",
        *(f"sample_{n}" for name in fs.solvers for n in (name, *fs.solvers[name].aliases)),
    }
    for name in dir(K):
        function = getattr(K, name)
        assert function.__name__ == name
        assert function.__doc__
        assert pickle.loads(pickle.dumps(function)) is function
    parameters = inspect.signature(K.sample_euler).parameters
    assert list(parameters)[:6] == ["model", "x", "sigmas", "extra_args", "callback", "disable"]
    assert K.sampler("euler") is K.sample_euler
    with pytest.raises(AttributeError, match="did you mean 'heun'"):
        _ = K.sample_huen
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = K.other
    with pytest.raises(ValueError, match="solver = 'huen' is not known"):
        K.sampler("huen")
    with pytest.raises(ValueError, match="give a name, a solver or a plan"):
        K.sampler(3)


def test_any_solver_and_any_number_of_axes():
    solver = fs.exponential(3, form="flow")
    for shape in ((3,), (2, 5), (2, 3, 4, 5, 6)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 14.6

        def network(x, s):
            s = s.reshape(-1, *(1 for _ in x.shape[1:]))
            return x / (1 + s * s)

        out = K.sampler(solver)(network, x, LIST, disable=True)
        # pixels are independent: what one element becomes does not depend on the shape
        flat = K.sampler(solver)(network, x.reshape(-1), LIST, disable=True)
        torch.testing.assert_close(out.reshape(-1), flat, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_state_is_wide_and_the_type_comes_back(kind):
    given = []

    def network(x, sigma):
        given.append((x.dtype, sigma.dtype))
        return (x.float() / (1 + sigma.float()[:, None] ** 2)).to(kind)

    x = torch.linspace(-10, 10, 8).reshape(4, 2).to(kind)
    for sigmas in (LIST, LIST.double(), LIST.half()):
        assert K.sample_dpmpp_2m(network, x, sigmas, disable=True).dtype == kind
    assert set(given) == {(kind, kind)}
    # 100 steps of which none is longer than what kind can tell apart from 1
    many = torch.linspace(10, 9, 101, dtype=torch.float64)
    out = K.sample_euler(lambda x, s: torch.zeros_like(x), x, many, disable=True)
    rounding = 0.0 if kind.itemsize == 2 else 3e-6
    torch.testing.assert_close(out, (x.double() * 0.9).to(kind), rtol=rounding, atol=0.0)


def test_what_sigmas_may_be():
    x, never = start(), pytest.fail
    for bad in (
        [3.0, 2.0, 2.0],
        [1.0, 2.0],
        [3.0, -1.0],
        [math.nan, 1.0],
        [math.inf, 1.0],
        [[3.0, 2.0]],
        [],
        3.0,
    ):
        with pytest.raises(ValueError, match=r"sigmas = .*need one axis of numbers that fall"):
            K.sample_heun(never, x, torch.tensor(bad))
    with pytest.raises(ValueError, match=r"from at most 1 to at least 0"):
        K.sample_heun(never, x, torch.tensor([1.5, 0.0]), process=fs.Flow())
    with pytest.raises(ValueError, match=r"process = VP.*accepted: fewstep.EDM"):
        K.sample_heun(never, x, LIST, process=fs.VP())
    assert K.sample_heun(never, x, LIST[:1]) is x  # no step
    # float32 arithmetic of shifts goes beyond 1 by a rounding
    slightly = torch.cat([torch.nextafter(FLOW[:1], torch.tensor(2.0)), FLOW[1:]])
    a, b = (
        K.sample_heun(flow_model, x, s, disable=True, process=fs.Flow()) for s in (slightly, FLOW)
    )
    assert torch.equal(a, b)
    # any device that floats can be read from, any floating type, a list
    a, b = (K.sample_heun(model, x, s, disable=True) for s in (LIST, LIST.tolist()))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_options_that_mean_nothing_are_refused():
    x, never = start(), pytest.fail
    for options, said in (
        ({"eta": 0.5}, "eta = 0.5 with solver = 'dpmpp_2m', for which k-diffusion has none"),
        ({"s_noise": 1.1}, "s_noise = 1.1, but this solver draws no noise"),
        ({"seed": 1}, "seed = 1, but this solver draws no noise"),
        ({"noise_sampler": print}, "noise_sampler = .*, but this solver draws no noise"),
        ({"s_churn": 1.0}, "need a solver that carries nothing from step to step"),
    ):
        with pytest.raises(ValueError, match=said):
            K.sample_dpmpp_2m(never, x, LIST, **options)
    with pytest.raises(ValueError, match="seed = 1 with a noise_sampler"):
        K.sample_ddpm(never, x, LIST, seed=1, noise_sampler=print)
    for name in ("ddpm", "dpmpp_2m_sde", "dpmpp_sde"):
        with pytest.raises(ValueError, match=r"eta = -0\.5; need a number >= 0"):
            getattr(K, f"sample_{name}")(never, x, LIST, eta=-0.5)
    with pytest.raises(ValueError, match="s_noise = -1"):
        K.sample_ddpm(never, x, LIST, s_noise=-1)
    with pytest.raises(ValueError, match=r"eta = 0\.5 with solver = 'seeds_2'"):
        K.sample_seeds_2(never, x, LIST, eta=0.5)
    with pytest.raises(TypeError, match="order"):
        K.sample_lms(never, x, LIST, order=3)


def test_noise():
    x = start()

    def run(name="euler_ancestral", **options):
        return getattr(K, f"sample_{name}")(model, x, LIST, disable=True, **options)

    assert torch.equal(run(seed=1), run(seed=1))
    assert not torch.equal(run(seed=1), run(seed=2))
    # ComfyUI's
    network = lambda x, s, seed: model(x, s)  # noqa: E731
    host = K.sample_euler_ancestral(network, x, LIST, {"seed": 1}, disable=True)
    assert torch.equal(host, run(seed=1))
    # torch's own seed governs where none is given
    torch.manual_seed(4)
    first, second = run(), run()
    torch.manual_seed(4)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)
    # a sample does not depend on its neighbours
    part = K.sample_euler_ancestral(model, x[:2], LIST, disable=True, seed=1)
    assert torch.equal(part, run(seed=1)[:2])
    # with no noise at all, what is left is the way down
    assert torch.isfinite(run(s_noise=0.0, seed=1)).all()
    assert torch.equal(run(s_noise=0.0, seed=1), run(s_noise=0.0, seed=2))
    assert torch.equal(run(eta=0.0), run("ddim"))
    # told the sigmas of the list, in its type
    told = []

    def sampler(sigma, after):
        told.append((sigma, after))
        return torch.zeros_like(x)

    run("sde_dpmpp_2m", noise_sampler=sampler)
    assert told == list(pairwise(LIST[:-1]))
    assert all(v.dtype == LIST.dtype for pair in told for v in pair)


def test_a_network_that_fails_is_named():
    with pytest.raises(FloatingPointError, match="NaN or inf at evaluation 1 of 7"):
        K.sample_euler(lambda x, s: x * math.nan, start(), LIST, disable=True)
    with pytest.raises(ValueError, match="shape"):
        K.sample_euler(lambda x, s: x[:1], start(), LIST, disable=True)


def test_churn_above_the_first_sigma_unless_a_process_ends_there():
    x, top = start(), []
    for options in ({}, {"process": fs.EDM(0.02, float(LIST[0]))}):
        seen = []
        network = lambda x, s, seen=seen: model(x, s, seen)  # noqa: E731
        K.sample_heun(network, x, LIST, disable=True, s_churn=2.0, **options)
        top.append(float(seen[0][1][0] / LIST[0]))
    assert top == pytest.approx([1 + 2 / 7, 1.0], rel=1e-6)


def test_progress_is_quiet_when_told(capfd):
    K.sample_heun(model, start(), LIST, disable=True)
    assert capfd.readouterr().err == ""
    K.sample_heun(model, start(), LIST, disable=False)
    assert "7/7" in capfd.readouterr().err


def test_in_inference_mode():
    with torch.inference_mode():
        out = K.sample_dpmpp_sde(model, start(), LIST, disable=True, seed=1)
    assert torch.equal(out, K.sample_dpmpp_sde(model, start(), LIST, disable=True, seed=1))


def test_nothing_of_k_diffusion_is_imported():
    code = (
        "import sys, fewstep; assert 'fewstep.k_diffusion' not in sys.modules; "
        "import fewstep.k_diffusion; assert 'k_diffusion' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- plans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc_2", "heun", "dpm_solver_2", "sde_dpmpp_2m"])
@pytest.mark.parametrize("path", ["vp", "flow"])
def test_a_plan_for_another_process_is_the_same_sampler(name, path):
    """x / alpha of a run on the plan's own process, from the same noise, is the result."""
    own = {"vp": fs.VP(), "flow": fs.Flow(t_start=0.98)}[path]
    plan = fs.plan(name, own, 8, predicts="v", final="min")
    z = start(torch.ones(1))
    extra = {"noise": list(z.expand(8, 6, 2))} if plan.draws else {}
    wanted = fs.sample(
        MIXTURE.denoiser(own, "v"), solver=plan, x=z * plan.levels[0].sigma, progress=False, **extra
    )
    wanted = wanted / plan.levels[-1].alpha
    sigmas = K.get_sigmas(plan)
    rho = plan.levels[0].rho
    assert sigmas[0] == pytest.approx(rho)
    assert sigmas[-1] == pytest.approx(plan.levels[-1].rho)
    options = {"noise_sampler": lambda a, b: z} if plan.draws else {}
    calls = []
    found = K.sampler(plan)(model, z * rho, sigmas, None, calls.append, True, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert [c["i"] for c in calls] == list(range(len(sigmas) - 1))
    # and through a file, which forgets what it was made from
    again = pickle.loads(pickle.dumps(plan))
    assert torch.equal(K.sampler(again)(model, z * rho, sigmas, disable=True, **options), found)


def test_a_plan_on_a_flow():
    plan = fs.plan("flow_ipndm_2", fs.Flow(shift=3.0), 6)
    sigmas = K.get_sigmas(plan, fs.Flow())
    assert (sigmas[0], sigmas[-1], len(sigmas)) == (1, 0, 7)
    x = start(sigmas)
    found = K.sampler(plan)(flow_model, x, sigmas, disable=True, process=fs.Flow())
    wanted = fs.sample(
        MIXTURE.denoiser(fs.Flow(), "flow"),
        solver="flow_ipndm_2",
        x=x,
        progress=False,
        grid=[level.t for level in plan.levels],
    )
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="alpha = 0, where sigma is infinite"):
        K.get_sigmas(plan)


def test_plans_that_a_list_cannot_express():
    plan, never = fs.plan("heun", fs.VP(), 8), pytest.fail
    x, sigmas = start(), K.get_sigmas(plan)
    for bad in (sigmas[1:], sigmas * 1.01, LIST):
        with pytest.raises(ValueError, match=r"this plan is made for .* and runs whole"):
            K.sampler(plan)(never, x, bad)
    for options in ({"eta": 1.0}, {"s_churn": 1.0}):
        with pytest.raises(ValueError, match="a plan has its noise"):
            K.sampler(plan)(never, x, sigmas, **options)
    with pytest.raises(ValueError, match="this solver draws no noise"):
        K.sampler(plan)(never, x, sigmas, seed=1)
    with pytest.raises(ValueError, match="from data to noise"):
        K.get_sigmas(fs.plan("heun", fs.VP(), 8, upward=True))
    with pytest.raises(ValueError, match="levels along an axis"):
        K.get_sigmas(fs.stacked([plan, plan]))
    with pytest.raises(ValueError, match="moves"):
        K.sampler(plan.fuse())(never, x, sigmas)


# -- k-diffusion's own results -------------------------------------------------------------------

#: float64, relative to max(1, max |x|)
LIMIT = 1e-10


def close(found, wanted):
    wanted = torch.as_tensor(wanted)
    assert float((found - wanted).abs().max()) <= LIMIT * max(1.0, float(wanted.abs().max()))


#: Their names where ours differ, and what makes the golden runs (all without noise) of them.
DETERMINISTIC = {
    "euler": ("euler", {}),
    "heun": ("heun", {}),
    "dpm_2": ("dpm_2", {}),
    "dpmpp_2m": ("dpmpp_2m", {}),
    "dpmpp_2s": ("dpmpp_2s_ancestral", {"eta": 0.0}),
    "dpmpp_2m_sde_midpoint": ("dpmpp_2m_sde", {"eta": 0.0}),
    "dpmpp_2m_sde_heun": ("dpmpp_2m_sde_heun", {"eta": 0.0}),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", {"eta": 0.0}),
    "lms_2": ("lms2", {}),
    "lms_3": ("lms3", {}),
    "lms_4": ("lms", {}),
}


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_golden_values(method):
    name, options = DETERMINISTIC[method]
    count = 0
    for case in official.cases_of("k_diffusion"):
        if case["method"] != method:
            continue
        sigmas = torch.exp(-torch.tensor(official.stored(case["lam"]), dtype=torch.float64))
        arrays, p = official.arrays(), case["p"]
        wanted = arrays[f"{p}_final"][case["row"]]
        kind, scale = official.golden()["args"][case["start"]]
        scale *= 1 if kind == "ve" else math.hypot(1, sigmas[0])  # noise alone, or data of size 1
        x = scale * torch.from_numpy(arrays[f"{p}_z"][: len(wanted)])
        mixture = official.mixture(p)
        network = lambda x, s, m=mixture: m.predict(x, 1.0, float(s[0]))[0]  # noqa: E731
        close(getattr(K, f"sample_{name}")(network, x, sigmas, disable=True, **options), wanted)
        count += 1
    assert count >= 22


class Bank:
    """The recorded normals of a golden run, as a noise_sampler."""

    def __init__(self, sigmas, name):
        self.sigmas, self.two, self.first = sigmas, name == "sample_dpmpp_sde", None

    def __call__(self, sigma, after):
        step = int((self.sigmas[:-1] >= sigma * (1 - 1e-9)).sum()) - 1
        theirs = [torch.from_numpy(noisy.arrays()["bank"][step, k]) for k in (0, 1)]
        if not self.two or sigma >= self.sigmas[step] * (1 - 1e-9):
            return theirs[0]
        # They draw for s to m and for s to t, we for s to m and for m to t of the same path.
        s, m, t = self.sigmas[step], sigma, after
        return ((s - t).sqrt() * theirs[1] - (s - m).sqrt() * theirs[0]) / (m - t).sqrt()


def test_golden_values_with_noise():
    counts: dict[str, int] = {}
    for case in noisy.golden()["cases"]:
        name, options = case["name"], dict(case["settings"])
        if case["code"] != "k-diffusion" or name == "sample_dpm_fast":
            continue  # dpm_fast steps to other levels than those of a list
        if options.get("eta", 0) > 1:
            continue  # below
        name += "_heun" * (options.pop("solver_type", "") == "heun")
        sample = getattr(K, name)
        if (r := options.pop("r", 0.5)) != 0.5:
            sample = K.sampler(fs.dpmpp_sde(options.pop("eta"), r))
        sigmas = torch.exp(-torch.tensor(noisy.stored(case["lam"]), dtype=torch.float64))
        x = torch.from_numpy(noisy.arrays()["z"]) * sigmas[0]
        bank = Bank(sigmas, case["name"])
        out = sample(model, x, sigmas, disable=True, noise_sampler=bank, **options)
        close(out, noisy.arrays()["final"][case["row"]])
        counts[case["name"]] = counts.get(case["name"], 0) + 1
    assert counts == {
        "sample_euler_ancestral": 12,
        "sample_dpm_2_ancestral": 9,
        "sample_dpmpp_2s_ancestral": 9,
        "sample_dpmpp_sde": 12,
        "sample_dpmpp_2m_sde": 24,
        "sample_dpmpp_3m_sde": 15,
        "sample_euler": 9,
        "sample_heun": 9,
        "sample_dpm_2": 9,
    }


@pytest.fixture(scope="module")
def theirs():
    """k-diffusion's `sampling` module alone: its package imports training code. What stands in for
    the libraries of that code is taken away again, so that other tests do not see it."""
    spec = find_spec("k_diffusion")
    if spec is None or find_spec("torchsde") is None:
        pytest.skip("k-diffusion (and torchsde) is not installed")
    stubs = {"k_diffusion": module_from_spec(spec)}
    for name in ("torchdiffeq", "torchvision", "torchvision.transforms"):
        stubs[name] = module_from_spec(ModuleSpec(name, None))
        stubs[name].odeint = stubs[name].transforms = stubs[name].functional = None  # type: ignore
    before = {name: sys.modules.get(name) for name in stubs}
    sys.modules.update(stubs)
    try:
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


class Normals:
    """A noise_sampler for solvers that draw once per step; also in place of torch.randn_like, which
    churn draws from at every step, used or not."""

    def __init__(self, sigmas, shape):
        generator = torch.Generator().manual_seed(5)
        self.z = torch.randn(len(sigmas), *shape, generator=generator, dtype=torch.float64)
        self.sigmas, self.calls = sigmas, iter(range(100))

    def __call__(self, sigma, after):
        assert sigma in self.sigmas
        return self.z[int((self.sigmas == sigma).nonzero())]

    def randn_like(self, x):
        return self.z[next(self.calls)]


CHURN = {"s_churn": 1.5, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.01}
#: (their name, ours, options of both, options of theirs, noise)
PAIRS = [
    *((name, name, {}, {}, "") for name in ("euler", "heun", "dpm_2", "dpmpp_2m", "lms")),
    *(("lms", f"lms{p}", {}, {"order": p}, "") for p in (2, 3)),
    *((name, name, CHURN, {}, "churn") for name in ("euler", "heun", "dpm_2")),
    *(
        (name, name, {"eta": eta, "s_noise": s}, {}, "normals")
        for name in ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral")
        for eta, s in ((1.0, 1.0), (0.6, 1.02), (0.0, 1.0))
    ),
    *(
        (name, name, {"eta": eta, "s_noise": s}, {}, "tree")
        for name in ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")
        for eta, s in ((1.0, 1.0), (0.6, 1.02), (0.0, 1.0))
    ),
    ("dpmpp_2m_sde", "dpmpp_2m_sde_heun", {"eta": 0.7}, {"solver_type": "heun"}, "tree"),
]


@pytest.mark.parametrize("last", [None, -1])
@pytest.mark.parametrize(("name", "ours", "options", "more", "noise"), PAIRS)
def test_the_package(theirs, monkeypatch, name, ours, options, more, noise, last):
    """Samples, questions and callbacks, for lists that end at 0 or before: theirs in float64, ours
    in float64 and float32 (in which their coefficients lose up to 3e-4: dpmpp_sde)."""
    sigmas = LIST[:last].double()
    x, normals = start(sigmas), Normals(sigmas, (6, 2))
    tree = noise == "tree" and theirs.BrownianTreeNoiseSampler(x, 0.01, 20.0, 3)

    def run(function, kind, options):
        calls, seen = [], []
        if tree:
            draw = lambda a, b: tree(a.double(), b.double()).to(kind)  # noqa: E731
            options = {**options, "noise_sampler": draw}
        elif (noise and function.__module__ == K.__name__) or noise == "normals":
            options = {**options, "noise_sampler": normals}
        args = model, x.to(kind), sigmas.to(kind), {"seen": seen}, calls.append, True
        return function(*args, **options), calls, seen

    if noise == "churn":
        monkeypatch.setattr(theirs.torch, "randn_like", normals.randn_like)
    their = getattr(theirs, f"sample_{name}")
    wanted, their_calls, their_seen = run(their, torch.float64, {**options, **more})
    monkeypatch.undo()
    assert len(their_calls) == len(sigmas) - 1
    for kind, limit in ((torch.float64, LIMIT), (torch.float32, 3e-6)):

        def near(a, b, kind=kind, limit=limit):
            assert a.dtype == kind
            assert float((a - b).abs().max()) <= limit * max(1.0, float(b.abs().max()))

        found, calls, seen = run(getattr(K, f"sample_{ours}"), kind, options)
        near(found, wanted)
        for (a, s), (b, t) in zip(seen, their_seen, strict=True):
            near(a, b)
            near(s, t)
        for mine, other in zip(calls, their_calls, strict=True):
            assert mine.keys() == other.keys()
            assert mine["i"] == other["i"]
            for key in ("x", "sigma", "sigma_hat", "denoised"):
                near(mine[key], other[key])


def test_where_k_diffusion_differs(theirs):
    """eta above 1: theirs cuts the noise of a step at the level it goes to, ours is refused where
    the method has no such step. dpm_fast: their n evaluations end in shorter orders, and the levels
    are theirs; a plan with these levels is the same method."""
    x, n = start(), 8
    normals = Normals(LIST.double(), x.shape)
    wanted = theirs.sample_euler_ancestral(
        model, x, LIST.double(), disable=True, eta=1.5, noise_sampler=normals
    )
    close(
        K.sample_euler_ancestral(
            model, x, LIST.double(), disable=True, eta=1.5, noise_sampler=normals
        ),
        wanted,
    )
    with pytest.raises(ValueError, match=r"eta = 1.5; need a number from 0 to 1"):
        K.sample_dpmpp_sde(pytest.fail, x, LIST, eta=1.5)
    high, low = 14.6, 0.03
    wanted = theirs.sample_dpm_fast(model, x, low, high, n, disable=True)
    lam = torch.linspace(-math.log(high), -math.log(low), n // 3 + 2)  # float32, as theirs
    grid = torch.exp(-lam.double()).tolist()
    plan = fs.plan("dpm_fast", fs.EDM(low * 0.99, high * 1.01), n, grid=grid)
    found = K.sampler(plan)(model, x, K.get_sigmas(plan), disable=True)
    assert float((found - wanted).abs().max()) < 1e-5  # their levels are float32
