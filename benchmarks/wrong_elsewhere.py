"""Print the tables of docs/wrong-elsewhere.md: other implementations against exact solutions.

    python benchmarks/wrong_elsewhere.py [NAME ...]

Without names all of them (a minute; `--list` prints the names). Tables that run diffusers or
k-diffusion need those packages (`tests/peers.txt`); the others run the published formula, written
out here, beside the right one.

Every network is exact: data are Gaussian, so that the data prediction, the solution of the
probability-flow ODE and, as all steps are linear, the law of stochastic samplers are closed forms.
An error is an error of the sampler. Errors are relative, |x - exact| / |exact| over 16 elements of
standard deviations 0.14 to 1 and several noises, or as said.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import fewstep as fs

Rows = list[list[str]]

STEPS = (20, 40, 80, 160)
SCALED_LINEAR = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")

EXACT = fs.exact.Gaussian(np.full(16, 0.3), np.geomspace(0.02, 1.0, 16))
#: The same without a mean: everything is linear, laws are those of sums of normals.
CENTRED = fs.exact.Gaussian(np.zeros(16), np.geomspace(0.02, 1.0, 16))
NOISE = torch.randn(64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# -- tables ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """make() gives the rows, the first of them the titles; peers are the modules it runs."""

    make: Callable[[], Rows]
    peers: tuple[str, ...]

    def rows(self) -> Rows:
        """Made anew, without the warnings of others."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.make()


TABLES: dict[str, Table] = {}


def table(name: str, *peers: str) -> Callable[[Callable[[], Rows]], Callable[[], Rows]]:
    """Register a table."""

    def add(make: Callable[[], Rows]) -> Callable[[], Rows]:
        TABLES[name] = Table(make, peers)
        return make

    return add


def markdown(rows: Rows) -> str:
    """A table, as in the page."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"| {' | '.join(['---'] * len(rows[0]))} |", *lines[1:]])


def shown(value: float) -> str:
    """Two digits."""
    return f"{value:.2g}" if 1e-3 <= abs(value) < 1000 else f"{value:.1e}"


def slope(errors: Sequence[float]) -> str:
    """Order: log2 of the last ratio."""
    return f"{math.log2(errors[-2] / errors[-1]):.1f}"


def relative(x: Tensor, exact: Tensor) -> float:
    """Of the norms."""
    return float((x - exact).norm() / exact.norm())


# -- runs ------------------------------------------------------------------------------------------


def vp(rho: float) -> fs.Level:
    """The level with this sigma / alpha on a variance-preserving path, as diffusers counts."""
    alpha = 1 / math.hypot(1, rho)
    return fs.Level(math.nan, alpha, rho * alpha, -math.log(rho))


def ve(sigma: float) -> fs.Level:
    """The same for k-diffusion."""
    return fs.Level(math.nan, 1.0, sigma, -math.log(sigma))


def nodes(n: int, high: float = 20.0, low: float = 0.1) -> list[float]:
    """n + 1 levels, rho^(1/7) uniform."""
    return (np.linspace(high ** (1 / 7), low ** (1 / 7), n + 1) ** 7).tolist()


def alternating(n: int) -> list[float]:
    """n + 1 levels, steps in log rho alternating 1 : 3."""
    steps = np.cumsum([0.0, *np.tile([1.0, 3.0], n // 2)])
    return (20.0 * np.exp(-math.log(200.0) * steps / steps[-1])).tolist()


def on_path(rho: Sequence[float], level: Callable[[float], fs.Level]) -> list[Tensor]:
    """Exact states of the ODE at these levels."""
    first = level(rho[0])
    x = NOISE * first.sigma + 0.3 * first.alpha
    ends = [level(r) for r in rho]
    pairs = [(e.alpha, e.sigma) for e in ends]
    return [x, *(EXACT.solve(x, pairs[0], pair) for pair in pairs[1:])]


@contextmanager
def wide() -> Iterator[None]:
    """diffusers computes in float32; here, so that rounding hides no order, in float64."""
    with mock.patch.object(torch, "float32", torch.float64):
        yield


def in_diffusers(
    scheduler: Any,
    rho: Sequence[float],
    x: Tensor,
    network: Callable[[Tensor, fs.Level], Tensor],
    exact: Sequence[Tensor] = (),
    noise: Sequence[Tensor] = (),
    level: Callable[[float], fs.Level] = vp,
) -> Tensor:
    """A scheduler on these levels, its network predicting data; the states after the first steps
    are replaced by exact ones, so that a start-up of lower order plays no part."""
    n = len(rho) - 1
    with wide():
        scheduler.set_timesteps(n)
        scheduler.sigmas = torch.tensor(rho, dtype=torch.float64)
        scheduler.timesteps = torch.arange(n, 0, -1)
        scheduler.num_inference_steps = n
        scheduler.set_begin_index(0)
        for i, t in enumerate(scheduler.timesteps):
            given = {"variance_noise": noise[i]} if noise else {}
            output = network(x, level(rho[i]))
            x = scheduler.step(output, t, x, **given).prev_sample
            if i + 1 < len(exact):
                x = exact[i + 1].clone()
    return x


def data(x: Tensor, level: fs.Level) -> Tensor:
    """The exact data prediction."""
    return EXACT.predict(x, level.alpha, level.sigma)[0]


def centred(x: Tensor, level: fs.Level) -> Tensor:
    """Of data without a mean."""
    return CENTRED.predict(x, level.alpha, level.sigma)[0]


def with_fewstep(solver: Any, rho: Sequence[float], exact: Sequence[Tensor] = ()) -> Tensor:
    """Ours on the same levels."""
    process = fs.EDM(rho[-1] / 2, rho[0] * 2)
    denoiser = EXACT.denoiser(process, "data")
    plan = fs.plan(solver, denoiser, grid=list(rho))
    state = plan.start(on_path(rho[:1], ve)[0])
    node = 0
    while not state.done:
        state = state.advance(denoiser.output(*state.query(), state.level, {}))
        node += 1
        if node < len(exact) and not state.done:
            state = state.replaced(exact[node])
    return state.x


def k_diffusion() -> Any:
    """Its `sampling` module alone: the package imports training code."""
    import scipy.integrate  # noqa: F401  (before the list of modules is put back)
    import torchsde  # noqa: F401

    spec = find_spec("k_diffusion")
    assert spec is not None
    stubs = {"k_diffusion": module_from_spec(spec)}
    for name in ("torchdiffeq", "torchvision", "torchvision.transforms"):
        stubs[name] = module_from_spec(ModuleSpec(name, None))
        for part in ("odeint", "transforms", "functional"):
            setattr(stubs[name], part, None)
    with mock.patch.dict(sys.modules, stubs):
        return importlib.import_module("k_diffusion.sampling")


def in_k_diffusion(
    function: Callable[..., Tensor], rho: Sequence[float], exact: Sequence[Tensor], **options: Any
) -> Tensor:
    """A function of k-diffusion; at the first nodes its state is replaced by the exact one."""
    seen: list[float] = []

    def model(x: Tensor, sigma: Tensor) -> Tensor:
        s = float(sigma[0])
        if s not in seen and len(seen) < len(exact):
            x.copy_(exact[len(seen)])
        seen.append(s)
        return data(x, ve(s))

    x = on_path(rho[:1], ve)[0]
    sigmas = torch.tensor(rho, dtype=torch.float64)
    return function(model, x, sigmas, disable=True, **options)


def law(n: int, run: Callable[[Tensor, list[Tensor]], Tensor], std: Tensor) -> Tensor:
    """Standard deviations of the result of a linear sampler that draws one normal per step: its
    answers to a start of one standard deviation, and to each normal alone."""
    x = torch.zeros(n + 1, 16, dtype=torch.float64)
    x[0] = std
    unit = [torch.zeros(n + 1, 16, dtype=torch.float64) for _ in range(n)]
    for i, z in enumerate(unit):
        z[i + 1] = 1.0
    return run(x, unit).square().sum(0).sqrt()


def spread(level: fs.Level) -> Tensor:
    """Standard deviations of x at a level."""
    return (level.alpha**2 * torch.from_numpy(np.geomspace(0.02, 1, 16)) + level.sigma**2).sqrt()


def law_of_plan(plan: fs.Plan, scales: np.ndarray) -> np.ndarray:
    """Standard deviations of every state of a stochastic plan, relative to the right ones, for
    Gaussian data of these standard deviations."""
    first, count = plan.levels[0], len(plan.draws)
    std = [np.hypot(v.alpha * scales, v.sigma) for v in plan.levels]
    x = np.zeros((count + 1, len(scales)))
    x[0] = np.hypot(first.alpha * scales, first.sigma)
    states = [x]
    for k, row in enumerate(plan.rows):
        new = np.zeros_like(x)
        for j, a in row.a.items():
            new += a * states[j]
        for j, b in row.b.items():
            level = plan.levels[j]
            gain = level.alpha * scales**2 / (level.alpha**2 * scales**2 + level.sigma**2)
            new += b * gain * states[j]
        for m, e in row.e.items():
            new[m + 1] += e
        states.append(new)
        assert len(states) == k + 2
    return np.array([np.sqrt((s**2).sum(0)) / v for s, v in zip(states, std, strict=True)])


# -- wrong formulas --------------------------------------------------------------------------------


@table("third-order", "diffusers", "k_diffusion")
def third_order() -> Rows:
    """Multistep methods called third order, from exact history."""
    import diffusers as hf

    K = k_diffusion()
    common = {"prediction_type": "sample", "final_sigmas_type": "sigma_min"}
    dpm = {**common, "lower_order_final": False, "solver_order": 3}

    def scheduler(kind: Any, **more: Any) -> Callable[[list[float]], tuple[Tensor, Tensor]]:
        def run(rho: list[float]) -> tuple[Tensor, Tensor]:
            exact = on_path(rho, vp)
            end = in_diffusers(kind(**more), rho, exact[0], data, exact[:4])
            return end, exact[-1]

        return run

    def function(rho: list[float]) -> tuple[Tensor, Tensor]:
        exact = on_path(rho, ve)
        return in_k_diffusion(K.sample_dpmpp_3m_sde, rho, exact[:4], eta=0.0), exact[-1]

    def ours(name: str) -> Callable[[list[float]], tuple[Tensor, Tensor]]:
        def run(rho: list[float]) -> tuple[Tensor, Tensor]:
            exact = on_path(rho, ve)
            return with_fewstep(name, rho, exact[:4]), exact[-1]

        return run

    found = {
        "diffusers DPMSolverMultistep, order 3": scheduler(hf.DPMSolverMultistepScheduler, **dpm),
        "k-diffusion dpmpp_3m_sde, eta 0": function,
        "fewstep `dpmpp_3m_shipped` (theirs)": ours("dpmpp_3m_shipped"),
        "fewstep `dpmpp_3m`": ours("dpmpp_3m"),
        "diffusers DEISMultistep, order 3": scheduler(
            hf.DEISMultistepScheduler,
            solver_order=3,
            prediction_type="sample",
            lower_order_final=False,
        ),
        "fewstep `noise_ab3` (the same)": ours("noise_ab3"),
    }
    rows = [["", *(f"{n} steps" for n in STEPS), "order"]]
    for name, run in found.items():
        errors = [relative(*run(nodes(n))) for n in STEPS]
        rows.append([name, *map(shown, errors), slope(errors)])
    return rows


@table("third-order-sde", "diffusers", "k_diffusion")
def third_order_sde() -> Rows:
    """The same with noise: error of the standard deviations of the samples."""
    import diffusers as hf

    K = k_diffusion()

    def scheduler(order: int) -> Callable[[list[float]], Tensor]:
        def run(rho: list[float]) -> Tensor:
            made = hf.DPMSolverMultistepScheduler(
                prediction_type="sample",
                final_sigmas_type="sigma_min",
                lower_order_final=False,
                solver_order=order,
                algorithm_type="sde-dpmsolver++",
            )
            std = law(
                len(rho) - 1,
                lambda x, z: in_diffusers(made, rho, x, centred, noise=z),
                spread(vp(rho[0])),
            )
            return std / spread(vp(rho[-1]))

        return run

    def function(rho: list[float]) -> Tensor:
        sigmas = torch.tensor(rho, dtype=torch.float64)

        def run(x: Tensor, z: list[Tensor]) -> Tensor:
            draws = iter(z)
            return K.sample_dpmpp_3m_sde(
                lambda x, s: centred(x, ve(float(s[0]))),
                x,
                sigmas,
                disable=True,
                noise_sampler=lambda *_: next(draws),
            )

        return law(len(rho) - 1, run, spread(ve(rho[0]))) / spread(ve(rho[-1]))

    def ours(name: str) -> Callable[[list[float]], Tensor]:
        def run(rho: list[float]) -> Tensor:
            plan = fs.plan(name, fs.EDM(rho[-1] / 2, rho[0] * 2), grid=rho)
            return torch.from_numpy(law_of_plan(plan, np.geomspace(0.02, 1, 16) ** 0.5)[-1])

        return run

    found = {
        "diffusers sde-dpmsolver++, order 3": scheduler(3),
        "diffusers sde-dpmsolver++, order 2": scheduler(2),
        "k-diffusion dpmpp_3m_sde": function,
        "fewstep `sde_dpmpp_3m`": ours("sde_dpmpp_3m"),
    }
    rows = [["", *(f"{n} steps" for n in STEPS), "weak order"]]
    for name, run in found.items():
        errors = [float((run(nodes(n)) - 1).abs().max()) for n in STEPS]
        rows.append([name, *map(shown, errors), slope(errors)])
    return rows


@table("singlestep", "diffusers")
def singlestep() -> Rows:
    """Three evaluations per step, on levels equal in lambda."""
    import diffusers as hf

    def theirs(n: int, kind: str) -> float:
        rho = np.geomspace(20.0, 0.1, n + 1).tolist()
        exact = on_path(rho, vp)
        made = hf.DPMSolverSinglestepScheduler(
            prediction_type="sample",
            final_sigmas_type="sigma_min",
            lower_order_final=False,
            solver_order=3,
            solver_type=kind,
        )
        made.set_timesteps(n)
        return relative(in_diffusers(made, rho, exact[0], data), exact[-1])

    def ours(n: int, name: str) -> float:
        rho = np.geomspace(20.0, 0.1, n // 3 + 1).tolist()
        return relative(with_fewstep(name, rho), on_path(rho, ve)[-1])

    counts = (15, 30, 60, 120)
    rows = [["", *(f"{n} NFE" for n in counts), "order"]]
    for name, run, given in (
        ("diffusers DPMSolverSinglestep, order 3, midpoint", theirs, "midpoint"),
        ("fewstep `dpmpp_3s`", ours, "dpmpp_3s"),
        ("diffusers DPMSolverSinglestep, order 3, heun", theirs, "heun"),
        ("fewstep `dpmpp_3s_taylor`", ours, "dpmpp_3s_taylor"),
    ):
        errors = [run(n, given) for n in counts]
        rows.append([name, *map(shown, errors), slope(errors)])
    return rows


# -- pipelines' loops: the scheduler chooses the levels --------------------------------------------


def path_of(config: Any) -> tuple[fs.Process, str, float]:
    """The process, what the network predicts, and what it is told per unit of time."""
    if config.get("use_flow_sigmas") or "shift" in config:
        return fs.Flow(), "flow", 1000.0
    if config["beta_schedule"] == "squaredcos_cap_v2":
        return fs.DiscreteVP.squared_cosine(), "noise", 1.0
    return fs.DiscreteVP.scaled_linear(), "noise", 1.0


@dataclass(frozen=True)
class Run:
    """told: times the network was told. moved: largest change of the last step. error: relative."""

    told: list[float]
    moved: float
    error: float


def pipeline(scheduler: Any, steps: int | None, **given: Any) -> Run:
    """The loop of a pipeline around the exact network, which answers at the time it is told."""
    path, predicts, scale = path_of(scheduler.config)
    network = EXACT.denoiser(path, predicts, time=scale if scale != 1 else None).network
    if steps is None:
        scheduler.set_timesteps(**given)
    else:
        scheduler.set_timesteps(steps)
    x = NOISE * getattr(scheduler, "init_noise_sigma", 1.0)
    told, before = [], x
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = network(scaled, t.double().expand(len(x)))
        before, x = x, scheduler.step(output, t, x).prev_sample
        told.append(float(t))
    start = path.level(told[0] / scale)
    exact = EXACT.solve(NOISE, (start.alpha, start.sigma), (1.0, 0.0))
    return Run(told, float((x - before).abs().max()), relative(x, exact))


def ours(theirs: Any, solver: str, grid: str | None = "config") -> Any:
    """The same configuration, run by fewstep."""
    more = {} if grid is None else {"grid": grid}
    return fs.diffusers.Scheduler.from_config(theirs.config, solver=solver, **more)


def schedulers() -> dict[Any, str]:
    """Multistep schedulers of diffusers, and what they are called here."""
    import diffusers as hf

    return {
        hf.DPMSolverMultistepScheduler: "dpmpp_2m",
        hf.DEISMultistepScheduler: "noise_ab2",
        hf.UniPCMultistepScheduler: "unipc_2",
    }


def short(kind: Any) -> str:
    """A class without "Scheduler"."""
    return kind.__name__.removesuffix("Scheduler")


def outcome(run: Callable[[], Run]) -> str:
    """The error, or what is raised."""
    try:
        error = run().error
    except (IndexError, AssertionError, RuntimeError, ValueError) as raised:
        return type(raised).__name__.lstrip("_")
    return shown(error) if math.isfinite(error) else "NaN"


@table("wasted-evaluation", "diffusers")
def wasted_evaluation() -> Rows:
    """A last network call that changes nothing."""
    import diffusers as hf

    cases: list[tuple[Any, dict[str, Any], str, int]] = [
        *(
            (hf.DEISMultistepScheduler, {**SCALED_LINEAR, name: True}, "noise_ab2", 10)
            for name in SPACINGS
        ),
        *((hf.DEISMultistepScheduler, FLOW, "noise_ab2", n) for n in (10, 20)),
        (
            hf.DDIMScheduler,
            {**SCALED_LINEAR, "clip_sample": False, "set_alpha_to_one": False},
            "ddim",
            10,
        ),
        (hf.PNDMScheduler, {**SCALED_LINEAR, "skip_prk_steps": True}, "plms", 10),
    ]
    titles = ["scheduler", "setting", "calls", "change in the last step", "error"]
    rows = [[*titles, "change, fewstep", "error, fewstep"]]
    for kind, config, solver, n in cases:
        theirs = kind(**config)
        bad = pipeline(theirs, n)
        made = ours(theirs, solver)
        if config is FLOW:  # the nodes that theirs has, and the end
            nodes = (1000 * theirs.sigmas[:-1]).tolist()
            good = pipeline(made, None, timesteps=nodes)
        else:
            good = pipeline(made, len(bad.told))
        setting = next((s for s in (*SPACINGS, "use_flow_sigmas") if s in config), "steps_offset=0")
        moved = "0" if bad.moved < 1e-12 else shown(bad.moved)
        cells = [short(kind), f"`{setting}`", str(len(bad.told)), moved, shown(bad.error)]
        rows.append([*cells, shown(good.moved), shown(good.error)])
    return rows


@table("spacings", "diffusers")
def spacings() -> Rows:
    """Levels that do not fit in a table of integer times."""
    rows = [["betas", "spacing", *(f"{short(k)}, {n}" for k in schedulers() for n in (10, 40))]]
    rows[0].append("fewstep, 10 and 40")
    for title, betas in (("squared cosine", COSINE), ("scaled linear", SCALED_LINEAR)):
        for spacing in SPACINGS:
            cells, mine = [], []
            for kind, solver in schedulers().items():
                theirs = kind(**betas, **{spacing: True})
                for n in (10, 40):
                    cells.append(outcome(lambda n=n, s=theirs: pipeline(s, n)))
                    made = ours(theirs, solver)
                    mine.append(float(outcome(lambda n=n, s=made: pipeline(s, n))))
            low, high = shown(min(mine)), shown(max(mine))
            rows.append([title, f"`{spacing}`", *cells, f"{low} to {high}"])
    return rows


@table("told", "diffusers")
def told() -> Rows:
    """The level that is used against the one that the network is told."""

    def mismatch(scheduler: Any) -> float:
        path, _, scale = path_of(scheduler.config)
        scheduler.set_timesteps(20)
        level = path.level(scheduler.timesteps.double().numpy() / scale)
        used = scheduler.sigmas[:-1].double().numpy()
        right = level.sigma if isinstance(path, fs.Flow) else level.rho
        return float(np.max(np.abs(used / right - 1)))

    rows = [["scheduler, 20 steps", "Karras", "exponential", "beta", "flow, shift 3"]]
    for kind, solver in schedulers().items():
        theirs = [kind(**SCALED_LINEAR, **{s: True}) for s in SPACINGS] + [kind(**FLOW)]
        rows.append([f"{short(kind)}", *(f"{mismatch(s):.1%}" for s in theirs)])
        worst = max(mismatch(ours(s, solver)) for s in theirs)
        assert worst < 1e-6
    rows.append(["fewstep, all of them", *["0.0%"] * 4])
    return rows


@table("truncated", "diffusers")
def truncated() -> Rows:
    """What truncated times cost: UniPC on a flow."""
    import diffusers as hf

    counts = (20, 40, 80, 160, 320)
    rows = [["error", *(f"{n} steps" for n in counts)], ["diffusers UniPCMultistep"]]
    rows.append(["fewstep `unipc_2`, the same sigmas"])
    for n in counts:
        theirs = hf.UniPCMultistepScheduler(**FLOW)
        rows[1].append(shown(pipeline(theirs, n).error))
        nodes = (1000 * theirs.sigmas[:-1]).tolist()
        made = ours(theirs, "unipc_2")
        rows[2].append(shown(pipeline(made, None, timesteps=nodes).error))
    return rows


@table("flow-shift", "diffusers")
def flow_shift() -> Rows:
    """FlowMatchEulerDiscreteScheduler, shift 3."""
    import diffusers as hf

    theirs = hf.FlowMatchEulerDiscreteScheduler(shift=3.0)
    rows = [["", "sigma 1", "2", "3", "4", "error"]]
    for name, made in (("diffusers", theirs), ("fewstep `ddim`", ours(theirs, "ddim"))):
        run = pipeline(made, 4)
        sigmas = [f"{t / 1000:.4f}" for t in run.told]
        rows.append([f"{name}, 4 steps", *sigmas, shown(run.error)])
    given = [1000.0, 750.0, 500.0, 250.0]
    for name, made in (("diffusers", theirs), ("fewstep `ddim`", ours(theirs, "ddim"))):
        run = pipeline(made, None, timesteps=given)
        used = made.sigmas[:-1] if made is theirs else torch.tensor(run.told) / 1000
        cells = [f"{float(s):.4f}" for s in used]
        rows.append([f"{name}, timesteps = 1000, 750, 500, 250", *cells, shown(run.error)])
    return rows


@table("few-steps", "diffusers")
def few_steps() -> Rows:
    """The ends of the schedule at few steps."""
    import diffusers as hf

    kind = hf.UniPCMultistepScheduler
    cases: list[tuple[str, Any, str, str | None]] = [
        ("UniPC, bh1", kind(**SCALED_LINEAR, solver_type="bh1"), "unipc_2_bh1", "config"),
        (
            "UniPC, lower_order_final=False",
            kind(**SCALED_LINEAR, lower_order_final=False),
            "unipc_2",
            "config",
        ),
        (
            "UniPC, order 3, lower_order_final=False",
            kind(**SCALED_LINEAR, solver_order=3, lower_order_final=False),
            "unipc_3",
            "config",
        ),
        ("PNDM", hf.PNDMScheduler(**SCALED_LINEAR), "pndm", None),
        ("Heun", hf.HeunDiscreteScheduler(**SCALED_LINEAR), "flow_ipndm_2", None),
    ]
    rows = [["diffusers scheduler", *(f"{n} steps" for n in (2, 3, 5)), "fewstep, same calls"]]
    for name, theirs, solver, grid in cases:
        cells = [outcome(lambda n=n, s=theirs: pipeline(s, n)) for n in (2, 3, 5)]
        mine = []
        for n in (2, 3, 5):
            calls = 2 * n - 1 if name == "Heun" else n
            mine.append(shown(pipeline(ours(theirs, solver, grid), calls).error))
        rows.append([name, *cells, f"`{solver}` {', '.join(mine)}"])
    return rows


@table("landing", "diffusers")
def landing() -> Rows:
    """DDIM and PNDM land at another time than they evaluate next."""
    import diffusers as hf

    counts = (7, 30, 120, 300, 600)
    rows = [["`timestep_spacing`, steps", *map(str, counts)]]
    for spacing in ("linspace", "trailing"):
        settings = {"clip_sample": False, "timestep_spacing": spacing, "set_alpha_to_one": True}
        theirs = [hf.DDIMScheduler(**SCALED_LINEAR, **settings) for _ in counts]
        bad = [pipeline(s, n).error for s, n in zip(theirs, counts, strict=True)]
        good = []
        for s in theirs:
            made = ours(s, "ddim")
            good.append(pipeline(made, None, timesteps=s.timesteps.tolist()).error)
        rows.append([f"{spacing}: diffusers DDIM", *map(shown, bad)])
        rows.append([f"{spacing}: fewstep `ddim`, the same times", *map(shown, good)])
    return rows


@table("inverse", "diffusers")
def inverse() -> Rows:
    """From data to noise: the ODE, run upward."""
    import diffusers as hf

    counts = (10, 20, 50)
    path = fs.DiscreteVP.scaled_linear()
    model = EXACT.denoiser(path, "noise")
    clean = EXACT.sample(64, seed=1).double()
    rows = [["", *(f"{n} steps" for n in counts)], ["diffusers DDIMInverse"]]
    rows += [["fewstep `ddim`, the same times"], ["fewstep `dpmpp_2m`, equal in lambda"]]
    for n in counts:
        theirs = hf.DDIMInverseScheduler(**SCALED_LINEAR, clip_sample=False)
        theirs.set_timesteps(n)
        x = clean
        for t in theirs.timesteps:
            output = model.network(x, t.double().clamp(min=0).expand(len(x)))
            x = theirs.step(output, t, x).prev_sample
        top = path.level(float(theirs.timesteps[-1]))
        exact = EXACT.solve(clean, (1.0, 0.0), (top.alpha, top.sigma))
        rows[1].append(shown(relative(x, exact)))
        grids = (theirs.timesteps.tolist(), "lambda")
        for row, solver, grid in zip(rows[2:], ("ddim", "dpmpp_2m"), grids, strict=True):
            plan = fs.plan(solver, model, None if grid != "lambda" else n, grid=grid, upward=True)
            x = fs.sample(model, x=clean, solver=plan, progress=False, dtype=torch.float64)
            last = plan.levels[-1]
            exact = EXACT.solve(clean, (1.0, 0.0), (last.alpha, last.sigma))
            row.append(shown(relative(x, exact)))
    return rows


# -- noise -----------------------------------------------------------------------------------------


@table("churn", "diffusers", "k_diffusion")
def churn() -> Rows:
    """A step from sigma = 1 to 0.5 about constant data, with churn 0.4: noise afterwards."""
    import diffusers as hf

    K = k_diffusion()
    sigmas = torch.tensor([1.0, 0.5], dtype=torch.float64)
    start = torch.tensor([[1.0], [0.0]], dtype=torch.float64)  # its noise; and that which is added
    draw = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    rows = [["right: 0.5", "standard deviation of the noise after the step"]]
    for kind, module in (
        (hf.EulerDiscreteScheduler, "scheduling_euler_discrete"),
        (hf.EDMEulerScheduler, "scheduling_edm_euler"),
    ):
        scheduler = kind()
        with wide():
            scheduler.set_timesteps(1)
            scheduler.sigmas = sigmas
            scheduler.timesteps = torch.tensor([1.0])
            scheduler.set_begin_index(0)
            scheduler.is_scale_input_called = True
            output = start  # eps, for data at 0
            if kind is hf.EDMEulerScheduler:  # F of D = c_skip x + c_out F = 0
                skip, out = 0.25 / 1.25, 0.5 / math.sqrt(1.25)
                output = -skip / out * start
            part = importlib.import_module(f"diffusers.schedulers.{module}")
            with mock.patch.object(part, "randn_tensor", return_value=draw):
                x = scheduler.step(output, scheduler.timesteps[0], start, s_churn=0.4).prev_sample
        rows.append([f"diffusers {short(kind)}", f"{float(x.norm()):.4f}"])
    with mock.patch.object(torch, "randn_like", return_value=draw):
        x = K.sample_euler(lambda x, s: 0 * x, start, sigmas, disable=True, s_churn=0.4)
    rows.append(["k-diffusion sample_euler", f"{float(x.norm()):.4f}"])
    plan = fs.plan(fs.churn("ddim", 0.4, s_min=0.0, s_max=1e9), fs.EDM(0.01, 10.0), grid=[1.0, 0.5])
    rows.append(
        ["fewstep `churn`", f"{0.5 * float(law_of_plan(plan, np.array([1e-9]))[-1, 0]):.4f}"]
    )
    return rows


@table("ddpm-end", "diffusers")
def ddpm_end() -> Rows:
    """DDPM with trailing times, whose last step goes to the data: noise left in the sample."""
    import diffusers as hf
    from diffusers.schedulers import scheduling_ddpm as part

    rows = [["`variance_type`, 10 steps", "diffusers DDPM", "fewstep"]]
    for kind, variance in (("fixed_small", "small"), ("fixed_large", "large")):
        theirs = hf.DDPMScheduler(
            **SCALED_LINEAR,
            clip_sample=False,
            timestep_spacing="trailing",
            variance_type=kind,
            prediction_type="sample",
        )
        theirs.set_timesteps(10)
        x, t = torch.zeros(1, 1, dtype=torch.float64), theirs.timesteps[-1]
        with mock.patch.object(part, "randn_tensor", return_value=torch.ones(1, 1)):
            left = float(theirs.step(x, t, x).prev_sample)
        plan = fs.plan(fs.ancestral(variance=variance), fs.DiscreteVP.scaled_linear(), 10)
        assert not plan.rows[-1].e
        rows.append([f"`{kind}`", shown(left), "0"])
    theirs = hf.DDPMScheduler(**SCALED_LINEAR, variance_type="fixed_large_log")
    theirs.set_timesteps(10)
    x = torch.ones(1, 1)
    finite = bool(theirs.step(x, theirs.timesteps[3], x).prev_sample.isfinite())
    rows.append(["`fixed_large_log`, any step", "a number" if finite else "NaN", "not offered"])
    return rows


@table("brownian", "k_diffusion")
def brownian() -> Rows:
    """The noise of one step, and of the same step in two: correlation."""
    K = k_diffusion()
    x = torch.zeros(1, 200_000)
    rows = [
        ["step h in lambda", "k-diffusion BrownianTreeNoiseSampler", "fewstep `Noise(path=True)`"]
    ]
    for h in (0.5, 1.0, 2.0, 4.0):
        sigmas = [math.exp(h / 2), 1.0, math.exp(-h / 2)]
        tree = K.BrownianTreeNoiseSampler(x, sigmas[-1] * 0.99, sigmas[0] * 1.01, seed=1)
        coarse, first, second = (
            tree(torch.tensor(sigmas[i]), torch.tensor(sigmas[j])).double().flatten()
            for i, j in ((0, 2), (0, 1), (1, 2))
        )
        # eta^2 = 1: after two steps of h / 2, sigma_t sqrt(1 - e^-h) (e^(-h/2) z_1 + z_2)
        both = math.exp(-h / 2) * first + second
        theirs = float(torch.corrcoef(torch.stack([coarse, both]))[0, 1])
        process = fs.EDM(0.001, 100.0)
        one = fs.plan("ddpm", process, grid=[sigmas[0], sigmas[2]])
        two = fs.plan("ddpm", process, grid=sigmas)
        zero = torch.zeros(1, 200_000, dtype=torch.float64)
        ends = []
        for plan in (one, two):
            state = plan.start(zero, noise=fs.Noise(1, path=True))
            while not state.done:
                state = state.advance(zero)
            ends.append(state.x.flatten())
        mine = float(torch.corrcoef(torch.stack(ends))[0, 1])
        rows.append([f"{h:g}", f"{theirs:.2f}", f"{mine:.2f}"])
    return rows


@table("neighbours", "diffusers", "k_diffusion")
def neighbours() -> Rows:
    """A sample alone, and beside another one: relative difference."""
    import diffusers as hf
    from diffusers.schedulers import scheduling_sde_ve as part

    K = k_diffusion()
    rows = [["", "difference of a sample with a neighbour, from alone"]]
    x = torch.stack([NOISE[0], 5 * NOISE[1]])

    def correct(x: Tensor) -> Tensor:
        scheduler = hf.ScoreSdeVeScheduler()
        scheduler.set_timesteps(10)
        scheduler.set_sigmas(10)
        with mock.patch.object(part, "randn_tensor", lambda shape, **_: NOISE[2 : 2 + shape[0]]):
            score = (0.0 - x) / 1.0
            return scheduler.step_correct(score, x).prev_sample[:1]

    rows.append(["diffusers ScoreSdeVe, step_correct", shown(relative(correct(x), correct(x[:1])))])

    def adaptive(x: Tensor) -> Tensor:
        def model(x: Tensor, sigma: Tensor) -> Tensor:
            return data(x, ve(float(sigma.flatten()[0])))

        return K.sample_dpm_adaptive(model, 20 * x, 0.05, 20.0, disable=True)[:1]

    rows.append(["k-diffusion sample_dpm_adaptive", shown(relative(adaptive(x), adaptive(x[:1])))])

    def mine(x: Tensor) -> Tensor:
        model = EXACT.denoiser(fs.EDM(0.05, 20.0), "data")
        return fs.sample_adaptive(
            model, x=20 * x, rtol=0.05, atol=0.0078, progress=False, dtype=torch.float64
        ).x[:1]

    found = relative(mine(x), mine(x[:1]))
    assert found < 1e-12
    rows.append(["fewstep `sample_adaptive`", "0"])
    return rows


@table("two-runs", "diffusers")
def two_runs() -> Rows:
    """Two runs of ten steps that take turns on one scheduler."""
    import diffusers as hf

    kinds = [*schedulers(), hf.EulerDiscreteScheduler, hf.DDIMScheduler]
    rows = [["scheduler", "two runs in turn"]]
    for kind in kinds:
        more = {"clip_sample": False} if kind is hf.DDIMScheduler else {}
        scheduler = kind(**SCALED_LINEAR, **more)
        model = EXACT.denoiser(fs.DiscreteVP.scaled_linear(), "noise")

        def run(x: list[Tensor], scheduler: Any = scheduler, model: Any = model) -> list[Tensor]:
            scheduler.set_timesteps(10)
            x = [v * scheduler.init_noise_sigma for v in x]
            for t in scheduler.timesteps:
                for i, v in enumerate(x):
                    seen = scheduler.scale_model_input(v, t)
                    output = model.network(seen, t.double().expand(len(v)))
                    x[i] = scheduler.step(output, t, v).prev_sample
            return x

        try:
            gap = relative(run([NOISE, 0.5 * NOISE])[0], run([NOISE])[0])
            rows.append([short(kind), "the same as alone" if gap < 1e-6 else shown(gap)])
        except (IndexError, AssertionError, RuntimeError) as raised:
            rows.append([short(kind), type(raised).__name__])
    plan = fs.plan("dpmpp_2m", model, 10)
    alone, other = (plan.start(NOISE * f) for f in (1.0, 0.5))
    ends = []
    for states in ([alone, other], [alone]):
        while not states[0].done:
            states = [s.advance(model.output(*s.query(), s.level, {})) for s in states]
        ends.append(states[0].x)
    assert torch.equal(*ends)
    rows.append(["fewstep, every plan", "the same as alone"])
    return rows


# -- published formulas and official code that is not installed: written out -----------------------


def shipped_vary(p: int) -> fs.Multistep:
    """UniPC with "vary_coeff" as its official code has it: in the corrector the new difference
    enters with the last phi and one entry of the inverse matrix, which is another term's."""
    right = fs.exponential(p, corrector=True, growth=math.inf)

    def corrector(
        process: fs.Process, history: Sequence[fs.Level], end: fs.Level
    ) -> fs.Formula | None:
        start, *older = history[1:]
        order = len(older) + 1
        if order == 1:
            assert right.corrector is not None
            return right.corrector(process, history, end)
        h = end.lam - start.lam
        ratio = [(v.lam - start.lam) / h for v in older] + [1.0]
        matrix = np.array([[r**k / math.factorial(k + 1) for k in range(order)] for r in ratio])
        inverse, phi = np.linalg.inv(matrix), [math.expm1(-h)]
        for k in range(1, order + 1):
            phi.append(phi[-1] / -h - 1 / math.factorial(k))
        b = np.zeros(len(history))
        b[1] = -end.alpha * phi[0]
        for m in range(order - 1):
            w = -end.alpha * sum(phi[k + 1] * inverse[k, m] for k in range(order - 1)) / ratio[m]
            b[2 + m] += w
            b[1] -= w
        w = -end.alpha * phi[order] * inverse[order - 2, -1]
        b[0] += w
        b[1] -= w
        a = [0.0, end.sigma / start.sigma, *[0.0] * len(older)]
        return fs.Formula(a, b.tolist(), 1, True, a[1])

    return replace(right, name=f"vary {p}", corrector=corrector)


def shipped_ipndm_v(p: int) -> fs.Multistep:
    """Variable-step iPNDM as diff-sampler has it: a parenthesis misplaced from order 3 on, and a
    sign in order 4."""

    def step(process: fs.Process, history: Sequence[fs.Level], end: fs.Level) -> fs.Formula:
        rho = [end.rho, *(v.rho for v in history)]
        h, *past = np.diff(rho[::-1])[::-1].tolist()
        c = [1.0]
        if past:
            c = [1 + h / past[0] / 2, -h / past[0] / 2]
        if len(past) > 1:
            q, w = past[0] / past[1], h + past[0]
            u = (1 - h / (3 * w) * h * w / (past[0] * sum(past[:2]))) / 2
            c = [c[0] + u, c[1] - (1 + q) * u, q * u]
        if len(past) > 2:
            v = (1 - h / (3 * w)) / 2 + (1 - h / (2 * w)) * h / (6 * (w + past[1]))
            v *= h * w * (w + past[1]) / (past[0] * sum(past[:2]) * sum(past))
            r = past[0] * sum(past[:2]) / (past[1] * sum(past[1:]))
            more = [1.0, -(1 + q + r), q + r * (1 + past[1] / past[2]), -r * q]
            c = [x + v * y for x, y in zip([*c, 0.0], more, strict=True)]
        start = history[0]
        W = [end.alpha * (end.rho - start.rho) * x for x in c]
        a = [w / v.sigma for w, v in zip(W, history, strict=True)]
        a[0] += end.alpha / start.alpha
        b = [-w * v.alpha / v.sigma for w, v in zip(W, history, strict=True)]
        return fs.Formula(a, b, 1, False)

    return fs.Multistep(f"ipndm_v {p}", 1, step, "diff-sampler", "sigma = 0: rho = 0", nodes=p)


@table("published")
def published() -> Rows:
    """Deterministic formulas, from exact history."""
    found: dict[str, Any] = {
        "UniPC-2 `vary_coeff`, official code": shipped_vary(2),
        "fewstep `unipc_2_vary`": fs.exponential(2, corrector=True, growth=math.inf),
        "UniPC-3 `vary_coeff`, official code": shipped_vary(3),
        "fewstep `unipc_3_vary`": fs.exponential(3, corrector=True, growth=math.inf),
        "iPNDM_v of order 4, diff-sampler": shipped_ipndm_v(4),
        "fewstep `deis_rhoab3`": "deis_rhoab3",
        "ER-SDE-3 without noise, paper and code": fs.er_sde(3, phi=1.0, third="uncorrected"),
        "fewstep `er_ode_3`": "er_ode_3",
        "iPNDM-4 (fixed numbers, as published)": "ipndm_4",
        "iPNDM_v of order 3, diff-sampler, steps 1 : 3": shipped_ipndm_v(3),
        "fewstep `deis_rhoab2`, steps 1 : 3": "deis_rhoab2",
    }
    rows = [["", *(f"{n} steps" for n in STEPS), "order"]]
    for name, solver in found.items():
        errors = []
        for n in STEPS:
            rho = alternating(n) if "1 : 3" in name else nodes(n)
            exact = on_path(rho, ve)
            errors.append(relative(with_fewstep(solver, rho, exact[:4]), exact[-1]))
        rows.append([name, *map(shown, errors), slope(errors)])
    return rows


@table("flow-grpo")
def grpo() -> Rows:
    """The variance that Euler-Maruyama makes, against that of the process: the largest ratio."""
    counts = (10, 20, 40)
    rows = [["largest variance over the right one", *(f"{n} steps" for n in counts)]]
    for name, solver in (
        ("Flow-GRPO's step, a = 0.7", fs.flow_grpo(0.7)),
        ("fewstep `sde(1, eta2=0.245)`", fs.sde(1, eta2=0.245)),
    ):
        cells = []
        for n in counts:
            plan = fs.plan(solver, fs.Flow(), n, grid="uniform")
            ratio = law_of_plan(plan, np.array([0.5])) ** 2
            cells.append(f"{ratio[:-1].max():.2f}")
        rows.append([name, *cells])
    return rows


@table("levenberg")
def levenberg() -> Rows:
    """Levenberg-Marquardt-Langevin with its default k = 0: change of the increments it filters."""
    rows = [["lambda", "float64", "float32"]]
    generator = torch.Generator().manual_seed(0)
    n = torch.randn(50, 3 * 32 * 32, generator=generator, dtype=torch.float64)
    for damping in (1e-2, 1e-3):
        cells = []
        for dtype in (torch.float64, torch.float32):
            x = n.to(dtype)
            square = x.square().sum(1, keepdim=True)
            m = x - x * square / (damping + square)
            out = m * (x.norm(dim=1, keepdim=True) / m.norm(dim=1, keepdim=True))
            cells.append(shown(relative(out.double(), n)))
        rows.append([shown(damping), *cells])
    return rows


# -- right elsewhere -------------------------------------------------------------------------------


@table("the-same", "diffusers", "k_diffusion")
def the_same() -> Rows:
    """Methods of different names that are one: largest difference of the results."""
    import diffusers as hf

    K = k_diffusion()
    rho = nodes(12)
    start, last = on_path(rho[:1], vp)[0], 1 / math.hypot(1, rho[-1])

    def scheduler(kind: Any, **more: Any) -> Tensor:
        if kind is not hf.DEISMultistepScheduler:
            more["final_sigmas_type"] = "sigma_min"
        made = kind(prediction_type="sample", lower_order_final=False, **more)
        return in_diffusers(made, rho, start, data) / last

    def function(name: str, **more: Any) -> Tensor:
        return in_k_diffusion(getattr(K, name), rho, (), **more)

    two_m = scheduler(hf.DPMSolverMultistepScheduler, solver_order=2)
    every = list(range(100))
    pairs = {
        "DPM-Solver++ 2M (midpoint) and UniP-2 (bh2, no corrector)": (
            two_m,
            scheduler(hf.UniPCMultistepScheduler, solver_order=2, disable_corrector=every),
        ),
        "DPM-Solver++ 2M of diffusers and of k-diffusion": (two_m, function("sample_dpmpp_2m")),
        "k-diffusion dpmpp_2m and dpmpp_2m_sde with eta 0": (
            function("sample_dpmpp_2m"),
            function("sample_dpmpp_2m_sde", eta=0.0),
        ),
        "k-diffusion euler and DPM-Solver++ of order 1 (DDIM)": (
            function("sample_euler"),
            scheduler(hf.DPMSolverMultistepScheduler, solver_order=1),
        ),
        "DPM-Solver of order 2 (heun) and DEIS of order 2": (
            scheduler(
                hf.DPMSolverMultistepScheduler,
                algorithm_type="dpmsolver",
                solver_type="heun",
            ),
            scheduler(hf.DEISMultistepScheduler, solver_order=2),
        ),
        "k-diffusion lms (numerical integrals) and exact Adams weights": (
            function("sample_lms"),
            with_fewstep("deis_rhoab3", rho),
        ),
    }
    rows = [["", "largest difference"]]
    for name, (one, other) in pairs.items():
        gap = float((one - other).abs().max())
        rows.append([name, "below 1e-10" if gap < 1e-10 else shown(gap)])
    return rows


def main() -> None:
    """Print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *TABLES], metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the names")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.list:
        print("\n".join(TABLES))
        return
    for name in options.names or TABLES:
        print(f"{name}\n\n{markdown(TABLES[name].rows())}\n")


if __name__ == "__main__":
    main()
