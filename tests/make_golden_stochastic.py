"""Make tests/golden/stochastic.npz and .json: stochastic samplers of diffusers, k-diffusion and two
papers, run on an exact Gaussian mixture with recorded noise, in float64.

    pip install diffusers scipy && pip install --no-deps k-diffusion
    python tests/make_golden_stochastic.py ER_SDE SA_SOLVER

ER_SDE: er_sde_solver.py of github.com/QinpengCui/ER-SDE-Solver; SA_SOLVER: sa_solver.py of
github.com/scxue/SA-Solver.

Their code is run as it is, but for three things: float32 is float64 (diffusers casts by itself),
the noise is taken from a bank (k-diffusion: its noise sampler or torch.randn_like; diffusers:
randn_tensor; papers: torch.randn_like;
Brownian trees: a sampler that looks the bank up), and the network is exact at the
level that the code is at. Noise number k of step i is bank[i, k] in every case.

A case holds: code and name (class or function), its settings, the number of steps, the coordinates
(ve: x / alpha, as in k-diffusion; vp; flow), lambda at the step boundaries and at every network
call, the final states and, for 8 steps, the states that the network was asked about. `error`: what
the official code raises instead. Lists are stored once and named by their number.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
SAMPLES, LONGEST, PER_STEP = 8, 15, 3
COUNTS = (4, 8, 15)


class Run:
    """The exact network, the bank of noise, and what was asked of both."""

    def __init__(self) -> None:
        with np.load(GOLDEN / "states.npz") as file:
            self.w, self.mu, self.cov = (
                torch.from_numpy(file[f"G1_{k}"]) for k in ("w", "mu", "cov")
            )
            self.z = torch.from_numpy(file["G1_z"])[:SAMPLES]
        rng = np.random.default_rng(20)
        bank = rng.normal(size=(LONGEST, PER_STEP, SAMPLES, 2))
        self.bank = torch.from_numpy(bank)
        self.begin()

    def begin(self) -> None:
        self.step, self.taken = 0, [0] * LONGEST
        self.levels: list[float] = []
        self.states: list[Tensor] = []

    def noise(self, step: int | None = None) -> Tensor:
        """The next draw of a step."""
        step = self.step if step is None else step
        self.taken[step] += 1
        return self.bank[step, self.taken[step] - 1]

    def data(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """E[x_0 | x], by Bayes' rule with full covariances."""
        self.levels.append(math.log(alpha / sigma))
        self.states.append(x.clone())
        total = alpha**2 * self.cov + sigma**2 * torch.eye(2)
        off = x[:, None] - alpha * self.mu
        solved = torch.linalg.solve(total, off[..., None])[..., 0]
        logits = self.w.log() - 0.5 * ((off * solved).sum(-1) + torch.logdet(total))
        means = self.mu + alpha * (self.cov @ solved[..., None])[..., 0]
        return torch.einsum("bk,bki->bi", logits.softmax(1), means)

    def eps(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        return (x - alpha * self.data(x, alpha, sigma)) / sigma


RUN: Run
CASES: list[dict[str, Any]] = []
FINALS: list[np.ndarray] = []
ASKED: list[np.ndarray] = []
LISTS: dict[tuple[float, ...], int] = {}


def listed(values: Sequence[float]) -> int:
    return LISTS.setdefault(tuple(float(v) for v in values), len(LISTS))


def record(
    code: str,
    name: str,
    settings: dict[str, Any],
    steps: int,
    coordinates: str,
    lam: Sequence[float],
    go: Callable[[], Tensor],
) -> None:
    """Run one case and keep what it gives."""
    RUN.begin()
    case: dict[str, Any] = {
        "code": code,
        "name": name,
        "settings": settings,
        "steps": steps,
        "coordinates": coordinates,
        "lam": listed(lam),
    }
    try:
        final = go()
        if not bool(final.isfinite().all()):
            raise FloatingPointError
    except (UnboundLocalError, FloatingPointError) as error:
        case["error"] = type(error).__name__
    else:
        case["evals"] = listed(RUN.levels)
        case["row"] = len(FINALS)
        FINALS.append(final.numpy())
        if steps == 8:
            case["asked"] = len(ASKED)
            ASKED.extend(x.numpy() for x in RUN.states)
    CASES.append(case)


# k-diffusion


def k_sampling() -> ModuleType:
    """Its sampling module alone: the package imports training code."""
    sys.modules["k_diffusion"] = module_from_spec(find_spec("k_diffusion"))
    for name in ("torchsde", "torchdiffeq", "torchvision"):
        if not find_spec(name):
            for part in (name, f"{name}.transforms"):
                sys.modules[part] = module_from_spec(ModuleSpec(part, None))
            sys.modules[name].odeint = sys.modules[name].transforms = None
            sys.modules[f"{name}.transforms"].functional = None
    return importlib.import_module("k_diffusion.sampling")


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, before)


def k_diffusion() -> None:
    sampling = k_sampling()
    low, high = 0.03, 14.6

    def run(name: str, sigmas: Tensor, steps: int, settings: dict[str, Any]) -> None:
        churning = "s_churn" in settings
        calls = iter(range(LONGEST))

        def sampler(sigma: Tensor, sigma_next: Tensor) -> Tensor:
            at = (sigmas[:-1].log() - torch.as_tensor(sigma).log()).abs()
            assert float(at.min()) < 1e-9
            return RUN.noise(int(at.argmin()))

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            return RUN.data(x, 1.0, float(sigma[0]))

        def go() -> Tensor:
            function = getattr(sampling, f"sample_{name}")
            x = RUN.z * sigmas[0]
            if churning:
                like = lambda x: RUN.noise(next(calls))  # noqa: E731
                with replaced(sampling.torch, "randn_like", like):
                    return function(model, x, sigmas, disable=True, **settings)
            keywords = {"noise_sampler": sampler, "disable": True, **settings}
            if name == "dpm_fast":
                return function(model, x, low, high, fast, **keywords)
            return function(model, x, sigmas, **keywords)

        fast = 0
        if name == "dpm_fast":
            fast = steps
            m = fast // 3 + 1
            sigmas = torch.exp(torch.linspace(math.log(high), math.log(low), m + 1))
        lam = [-math.log(s) if s > 0 else math.inf for s in sigmas.tolist()]
        record("k-diffusion", f"sample_{name}", settings, steps, "ve", lam, go)

    for steps in COUNTS:
        karras = sampling.get_sigmas_karras(steps, low, high)
        exponential = sampling.get_sigmas_exponential(steps, low, high)
        open_end = sampling.get_sigmas_karras(steps + 1, low, high)[:-1]  # ends at sigma > 0
        for name in ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral"):
            run(name, karras, steps, {"eta": 1.0})
            run(name, karras, steps, {"eta": 0.5})
            run(name, exponential, steps, {"eta": 1.0, "s_noise": 1.01})
        run("euler_ancestral", open_end, steps, {"eta": 0.7})
        run("euler_ancestral", karras, steps, {"eta": 1.5})
        for eta, r in ((1.0, 0.5), (0.5, 0.5), (1.0, 0.3)):
            run("dpmpp_sde", karras, steps, {"eta": eta, "r": r})
        run("dpmpp_sde", exponential, steps, {"eta": 1.0, "s_noise": 1.01})
        for kind in ("midpoint", "heun"):
            for eta in (1.0, 0.5):
                run("dpmpp_2m_sde", karras, steps, {"eta": eta, "solver_type": kind})
            run("dpmpp_2m_sde", exponential, steps, {"eta": 1.0, "solver_type": kind})
            run("dpmpp_2m_sde", open_end, steps, {"eta": 0.25, "solver_type": kind})
        for eta in (1.0, 0.5, 0.25):
            run("dpmpp_3m_sde", karras, steps, {"eta": eta})
        run("dpmpp_3m_sde", exponential, steps, {"eta": 1.0, "s_noise": 1.01})
        run("dpmpp_3m_sde", open_end, steps, {"eta": 1.0})
        for name in ("euler", "heun", "dpm_2"):
            run(name, karras, steps, {"s_churn": 1.0})
            run(name, karras, steps, {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 50.0})
            window = {"s_churn": 2.0, "s_tmin": 0.1, "s_tmax": 5.0, "s_noise": 1.007}
            run(name, exponential, steps, window)
        run("dpm_fast", karras, steps, {"eta": 1.0})
        run("dpm_fast", karras, steps, {"eta": 0.5})


# diffusers


def scheduler(module: str, name: str, **config: Any) -> Any:
    """A scheduler from its own source with float32 replaced by float64, its noise from the bank."""
    full = f"diffusers.schedulers.scheduling_{module}"
    if f"{full}_64" not in sys.modules:
        spec = find_spec(full)
        made = ModuleType(f"{full}_64")
        made.__package__, made.__file__ = "diffusers.schedulers", spec.origin
        sys.modules[made.__name__] = made
        text = Path(spec.origin).read_text().replace("float32", "float64")
        exec(compile(text, spec.origin, "exec"), made.__dict__)
        made.randn_tensor = lambda *args, **keywords: RUN.noise()
        made.BrownianTreeNoiseSampler = lambda *args, **keywords: lambda a, b: RUN.noise()
    return getattr(sys.modules[f"{full}_64"], name)(**config)


SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def lam_of(alphas_cumprod: Tensor, indices: Sequence[int]) -> list[float]:
    """lambda at integer times; below 0: clean."""
    square = alphas_cumprod.numpy()
    return [0.5 * math.log(square[i] / (1 - square[i])) if i >= 0 else math.inf for i in indices]


def by_index(
    module: str,
    name: str,
    steps: int,
    config: dict[str, Any],
    settings: dict[str, Any] | None = None,
    ends: Callable[[Any, list[int]], list[int]] = lambda made, times: [*times[1:], -1],
    custom: list[int] | None = None,
) -> None:
    """Schedulers that know integer times. ends: the time at which every step ends."""
    settings = settings or {}
    made = scheduler(module, name, **SD, **config)
    made.set_timesteps(*([] if custom else [steps]), **({"timesteps": custom} if custom else {}))
    times = made.timesteps.tolist()
    square = made.alphas_cumprod

    def go() -> Tensor:
        x = RUN.z
        for i, t in enumerate(made.timesteps):
            RUN.step = i
            alpha, sigma = float(square[t]) ** 0.5, float(1 - square[t]) ** 0.5
            output = RUN.eps(x, alpha, sigma)
            x = made.step(
                output, t if name != "DDPMScheduler" else int(t), x, **settings
            ).prev_sample
        return x

    lam = lam_of(square, [times[0], *ends(made, times)])
    shown = {**config, **settings, **({"timesteps": custom} if custom else {})}
    record("diffusers", name, shown, len(times), "vp", lam, go)


def by_sigma(
    module: str,
    name: str,
    steps: int,
    config: dict[str, Any],
    settings: dict[str, Any] | None = None,
    *,
    coordinates: str = "vp",
    shown: dict[str, Any] | None = None,
) -> None:
    """Schedulers that know sigma / alpha. ve: their state is x / alpha; vp: it is x."""
    settings = settings or {}
    table = {} if module in ("edm_dpmsolver_multistep", "edm_euler") or "cosine" in module else SD
    made = scheduler(module, name, **table, **config)
    made.set_timesteps(steps)
    inner = getattr(made, "sigmas_interpol", None)  # KDPM2
    sigmas = made.sigmas
    two = module in ("k_dpm_2_ancestral_discrete", "dpmsolver_sde")
    bounds = [*sigmas[::2].tolist()[:steps], 0.0] if two else sigmas.tolist()

    def level(k: int, first: bool) -> float:
        if not two or first:
            return float(sigmas[k])
        if inner is not None:
            return float(inner[k - 1])
        # the same way as the scheduler: exp(-(t + (t_next - t) / 2))
        t, t_next = -sigmas[k - 1].log(), -sigmas[k].log()
        return float((t + (t_next - t) * 0.5).neg().exp())

    def go() -> Tensor:
        x = RUN.z if coordinates == "vp" else RUN.z * sigmas[0]
        for k, t in enumerate(made.timesteps):
            RUN.step = k // 2 if two else k
            first = getattr(made, "state_in_first_order", True)
            rho = level(k, first)
            alpha = (1 + rho**2) ** -0.5 if coordinates == "vp" else 1.0
            made.scale_model_input(x, t)
            data = RUN.data(x, alpha, alpha * rho)
            output = (x - alpha * data) / (alpha * rho)
            if made.config.get("sigma_data") is not None:
                s = made.config.sigma_data
                skip = s**2 / (rho**2 + s**2)
                output = (data - skip * x) / (rho * s / (rho**2 + s**2) ** 0.5)
                if made.config.prediction_type == "v_prediction":
                    output = -output
            x = made.step(output, t, x, **settings).prev_sample
        return x

    lam = [-math.log(s) if s > 0 else math.inf for s in bounds]
    record("diffusers", name, {**config, **settings, **(shown or {})}, steps, coordinates, lam, go)


def flow(module: str, name: str, steps: int, config: dict[str, Any], plain: bool = False) -> None:
    """Schedulers of flow models: alpha = 1 - sigma, and the network predicts eps - x_0."""
    made = scheduler(module, name, **config)
    if plain:  # its own set_timesteps takes the sigmas of a video pipeline
        made.set_timesteps(sigmas=[*np.linspace(1.0, 1 / steps, steps), 0.0])
    else:
        made.set_timesteps(steps)
    sigmas = [float(s) for s in made.sigmas]

    def go() -> Tensor:
        x = RUN.z
        for i, t in enumerate(made.timesteps[:steps]):
            RUN.step = i
            sigma = float(made.sigmas[i])
            if sigma == 1:  # alpha = 0: D is the mean, and lambda is not finite
                RUN.levels.append(-math.inf)
                RUN.states.append(x.clone())
                data = (RUN.w[:, None] * RUN.mu).sum(0).expand(x.shape)
            else:
                data = RUN.data(x, 1 - sigma, sigma)
            output = (x - data) / sigma
            x = made.step(output, t, x).prev_sample
        return x

    lam = [math.log((1 - s) / s) if 0 < s < 1 else math.inf * (1 if s == 0 else -1) for s in sigmas]
    record("diffusers", name, config, steps, "flow", lam, go)


def score_sde_ve(steps: int, corrections: int) -> None:
    """Predictor-corrector: the level of the evaluation and that of the update are made to agree."""
    name = "ScoreSdeVeScheduler"
    made = scheduler("sde_ve", name, sigma_max=80.0, sigma_min=0.01, snr=0.16)
    made.set_timesteps(steps)
    made.set_sigmas(steps)
    # times i / (n - 1), rounding kept off the truncation to an index
    times = torch.arange(steps - 1, -1, -1) / (steps - 1) + 1e-9
    sigmas = [float(made.discrete_sigmas[i]) for i in range(steps - 1, -1, -1)]

    def go() -> Tensor:
        x, mean = RUN.z * sigmas[0], RUN.z
        for i, t in enumerate(times):
            RUN.step = i
            for _ in range(corrections):
                score = -RUN.eps(x, 1.0, sigmas[i]) / sigmas[i]
                x = made.step_correct(score, x).prev_sample
            score = -RUN.eps(x, 1.0, sigmas[i]) / sigmas[i]
            out = made.step_pred(score, t, x)
            x, mean = out.prev_sample, out.prev_sample_mean
        return mean

    lam = [*(-math.log(s) for s in sigmas), math.inf]
    settings = {"snr": 0.16, "corrections": corrections}
    record("diffusers", name, settings, steps, "ve", lam, go)


def diffusers() -> None:
    for steps in COUNTS:
        for kind in ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"):
            for spacing in ("leading", "trailing"):
                config = {"variance_type": kind, "clip_sample": False, "timestep_spacing": spacing}
                by_index("ddpm", "DDPMScheduler", steps, config)
        jump = 1000 // steps
        for eta in (0.3, 0.5, 1.0):
            own: dict[str, Any] = {"clip_sample": False}
            by_index("ddim", "DDIMScheduler", steps, own, {"eta": eta})
            by_index(
                "ddim",
                "DDIMScheduler",
                steps,
                {**own, "set_alpha_to_one": False, "steps_offset": 1},
                {"eta": eta},
                ends=lambda made, times, jump=jump: [max(t - jump, 0) for t in times],
            )
        by_sigma(
            "euler_ancestral_discrete",
            "EulerAncestralDiscreteScheduler",
            steps,
            {},
            coordinates="ve",
        )
        config = {"timestep_spacing": "trailing"}
        by_sigma(
            "euler_ancestral_discrete",
            "EulerAncestralDiscreteScheduler",
            steps,
            config,
            coordinates="ve",
        )
        for config in ({}, {"use_karras_sigmas": True}):
            for module, name in (
                ("k_dpm_2_ancestral_discrete", "KDPM2AncestralDiscreteScheduler"),
                ("dpmsolver_sde", "DPMSolverSDEScheduler"),
            ):
                by_sigma(module, name, steps, config, coordinates="ve")
        module, name = "dpmsolver_multistep", "DPMSolverMultistepScheduler"
        for algorithm in ("sde-dpmsolver", "sde-dpmsolver++"):
            ends = ["sigma_min"] if algorithm == "sde-dpmsolver" else ["zero", "sigma_min"]
            for order, kind in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "heun")):
                for final in ends:
                    own = {"algorithm_type": algorithm, "solver_order": order, "solver_type": kind}
                    by_sigma(module, name, steps, {**own, "final_sigmas_type": final})
        own = {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}
        by_sigma(module, name, steps, own)
        for order, kind in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "heun")):
            config = {"solver_order": order, "solver_type": kind}
            module, name = "cosine_dpmsolver_multistep", "CosineDPMSolverMultistepScheduler"
            by_sigma(module, name, steps, config, coordinates="ve")
            module, name = "edm_dpmsolver_multistep", "EDMDPMSolverMultistepScheduler"
            config = {"algorithm_type": "sde-dpmsolver++", **config}
            by_sigma(module, name, steps, config, coordinates="ve")
        for tau in ("0", "1", "0.5", "window"):
            functions = {"window": lambda t: 1 if 200 <= t <= 800 else 0}
            value = functions.get(tau) or (lambda t, tau=tau: float(tau))
            pairs = ((1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4), (3, 2), (1, 3))
            for p, c in pairs if tau in ("1", "window") else pairs[3:6:2]:
                sasolver(steps, p, c, tau, value, "data_prediction")
                if c == p + 1:
                    sasolver(steps, p, c, tau, value, "noise_prediction")
        for scaling in (10.0, 1e12):
            own = {"clip_sample": False, "timestep_scaling": scaling}
            by_index("lcm", "LCMScheduler", steps, own)
        for eta in (0.3, 0.0, 1.0):
            by_index(
                "tcd",
                "TCDScheduler",
                steps,
                {},
                {"eta": eta},
                ends=lambda made, times: [*times[1:], 0],
            )
        for churn in ({"s_churn": 1.0}, {"s_churn": 2.0, "s_tmin": 0.1, "s_tmax": 5.0}):
            by_sigma("euler_discrete", "EulerDiscreteScheduler", steps, {}, churn, coordinates="ve")
            by_sigma("edm_euler", "EDMEulerScheduler", steps, {}, churn, coordinates="ve")
        module = "flow_match_euler_discrete"
        for shift in (1.0, 3.0):
            config = {"stochastic_sampling": True, "shift": shift}
            flow(module, "FlowMatchEulerDiscreteScheduler", steps, config)
        flow("flow_match_lcm", "FlowMatchLCMScheduler", steps, {"shift": 3.0})
        for eta in (1.0, 0.5):
            name = "LTXEulerAncestralRFScheduler"
            flow("ltx_euler_ancestral_rf", name, steps, {"eta": eta}, plain=True)
        for corrections in (0, 1, 2):
            score_sde_ve(steps, corrections)


def sasolver(
    steps: int, p: int, c: int, tau: str, function: Callable[[float], float], kind: str
) -> None:
    config = {
        "predictor_order": p,
        "corrector_order": c,
        "algorithm_type": kind,
        "tau_func": lambda t: torch.as_tensor(float(function(t))),
    }
    made_of = {**config, "tau_func": tau}
    by_sigma("sasolver", "SASolverScheduler", steps, config, shown=made_of)


# Papers


def loaded(path: Path, **changes: str) -> dict[str, Any]:
    """The names of a file, with float32 replaced by float64 and other changes of its text."""
    text = path.read_text().replace("float32", "float64")
    for before, after in changes.values():
        assert before in text, before
        text = text.replace(before, after)
    made = {"__name__": path.stem}
    exec(compile(text, str(path), "exec"), made)
    return made


def counted(first: int) -> Callable[[Tensor], Tensor]:
    """torch.randn_like for code that draws once in every step, the first being number `first`."""
    calls = itertools.count(first)

    def like(x: Tensor) -> Tensor:
        step = next(calls)
        return RUN.noise(step) if step >= 0 else torch.zeros_like(x)

    return like


#: func_type of the ER-SDE code: its noise scale phi.
SCALES = {7: "default", 1: "rho", 2: "rho^2", 4: "rho^1.5", 5: "rho^2.5"}


def er_sde(path: Path) -> None:
    # with today's numpy, its functions do not take tensors everywhere
    names = loaded(path, numpy=("np.", "torch."))
    # the same with integrals that are accurate: the midpoint rule with many points
    fine = loaded(
        path,
        numpy=("np.", "torch."),
        count=("nums_intergrate = 100.0", "nums_intergrate = 200000.0"),
        place=("nums_indices/ nums", "(nums_indices + 0.5)/ nums"),
    )
    for steps, kind, order, points, scale in itertools.product(
        COUNTS, ("ve", "vp"), (1, 2, 3), (100, 200000), (7, 1, 2, 4, 5)
    ):
        if (points == 100 or order > 1) and (scale in (2, 7) or order == 3):
            er_sde_case(names if points == 100 else fine, points, steps, kind, order, scale)


def er_sde_case(
    code: dict[str, Any], points: int, steps: int, kind: str, order: int, scale: int
) -> None:
    high, low = 14.6, 0.05
    u = torch.arange(steps + 1) / steps
    alphas = torch.ones(steps + 1)
    if kind == "ve":
        sigmas = (high ** (1 / 7) + u * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        sigmas[-1] = 0.0
    else:
        t = 1 - 0.99 * u
        alphas = (-0.25 * t**2 * 19.9 - 0.05 * t).exp()
        sigmas = (1 - alphas**2).sqrt()

    def model(x: Tensor, i: int) -> Tensor:
        return RUN.data(x, float(alphas[i]), float(sigmas[i]))

    def phi(x: Tensor) -> Tensor:
        return code["customized_func"](x, scale)

    def go() -> Tensor:
        solver = code["ER_SDE_Solver"](sde_type=kind)
        run = getattr(solver, f"{kind}_{order}_order" + "_taylor" * (order > 1))
        grid = [sigmas] if kind == "ve" else [alphas, sigmas]
        x = RUN.z * (sigmas[0] if kind == "ve" else 1.0)
        with replaced(torch, "randn_like", counted(0)):
            return run(model, x, *grid, range(steps), phi)

    lam = [math.log(a / s) if s > 0 else math.inf for a, s in zip(alphas, sigmas, strict=True)]
    settings = {"order": order, "phi": SCALES[scale], "points": points}
    coordinates = "ve" if kind == "ve" else "linear"
    record("ER-SDE-Solver", "er_sde", settings, steps, coordinates, lam, go)


def sa_solver(path: Path) -> None:
    names = loaded(path)
    names["tqdm"] = iter
    for steps, (p, c), tau, skip, mode in itertools.product(
        COUNTS, ((1, 0), (2, 2), (3, 0), (3, 4)), (1, "window"), ("time", "logSNR"), ("PEC", "PECE")
    ):
        if mode == "PEC" or (c and skip == "logSNR"):
            sa_solver_case(names, steps, p, c, tau, skip, mode)


def sa_solver_case(
    names: dict[str, Any], steps: int, p: int, c: int, tau: Any, skip: str, mode: str
) -> None:
    schedule = names["NoiseScheduleVP"](schedule="linear")

    def noise_level(t: Any) -> int:
        return int(tau == 1 or 0.2 <= float(t) <= 0.8)

    def eps(x: Tensor, t: Tensor) -> Tensor:
        alpha = float(schedule.marginal_alpha(t[:1]))
        return RUN.eps(x, alpha, float(schedule.marginal_std(t[:1])))

    solver = names["SASolver"](eps, schedule)

    def go() -> Tensor:
        settings = {"predictor_order": p, "corrector_order": c, "pc_mode": mode}
        ends = {"skip_type": skip, "t_start": 1.0, "t_end": 0.01}
        with replaced(torch, "randn_like", counted(-1)):
            return solver.sample("few_steps", RUN.z, noise_level, steps, **ends, **settings)

    lam = schedule.marginal_lambda(solver.get_time_steps(skip, 1.0, 0.01, steps, 1, "cpu"))
    settings = {"predictor_order": p, "corrector_order": c, "tau": tau, "pc_mode": mode}
    record("SA-Solver", "sample_few_steps", settings, steps, "linear", lam.tolist(), go)


def main() -> None:
    """Run all and write both files."""
    global RUN
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("er_sde", "sa_solver"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    warnings.filterwarnings("ignore")
    RUN = Run()
    k_diffusion()
    diffusers()
    er_sde(options.er_sde)
    sa_solver(options.sa_solver)
    lists = np.full((len(LISTS), max(map(len, LISTS))), np.nan)
    for i, values in enumerate(LISTS):
        lists[i, : len(values)] = values
    np.savez_compressed(
        GOLDEN / "stochastic.npz",
        z=RUN.z.numpy(),
        bank=RUN.bank.numpy(),
        final=np.array(FINALS),
        asked=np.array(ASKED),
        lists=lists,
    )
    about = {
        "codes": {"diffusers": version("diffusers"), "k-diffusion": version("k-diffusion")},
        "torch": version("torch"),
        "problem": "G1",
    }
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in CASES)
    text = f'{{"about":{json.dumps(about)},\n"cases":[\n{lines}\n]}}\n'
    (GOLDEN / "stochastic.json").write_text(text)
    failed = sum("error" in case for case in CASES)
    print(f"{len(CASES)} cases, {failed} that the official code does not run")


if __name__ == "__main__":
    main()
