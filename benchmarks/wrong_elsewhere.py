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
from itertools import pairwise
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
    with mock.patch.object(torch, "float32", torch.float64), warnings.catch_warnings():
        warnings.simplefilter("ignore")
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
