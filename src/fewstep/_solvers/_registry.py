"""The names. One line per solver; tests, the command line and the docs iterate over it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf

from .._prediction import unknown
from ._base import Multistep, Solver
from ._exponential import Second, exponential
from ._flow_sde import flow_grpo
from ._gaussian import gaussian
from ._momentum import dualfast, ghvb, heavy_ball, ipndm
from ._noisy import churn, predictor_corrector, restart
from ._pndm import pndm
from ._reversible import bdia, edict, reversible_heun
from ._runge_kutta import exponential_runge_kutta, runge_kutta
from ._seeds import ancestral_singlestep, dpmpp_sde, seeds
from ._singlestep import singlestep
from ._stochastic import ancestral, er_sde, jump, sa_solver, sde
from ._v3 import dpm_solver_v3

__all__ = ["Registry", "as_solver", "solvers"]


class Registry(Mapping[str, Solver]):
    """Solvers by name. Iterating gives each solver once; look-up knows aliases too."""

    def __init__(self, *entries: Solver) -> None:
        self._entries: dict[str, Solver] = {}
        self._aliases: dict[str, str] = {}
        for solver in entries:
            self.register(solver)

    def register(self, solver: Solver) -> Solver:
        """Add a solver; a name can be given once."""
        for name in (solver.name, *solver.aliases):
            if name in self._entries or name in self._aliases:
                raise ValueError(f"solver name {name!r} is taken")
        self._entries[solver.name] = solver
        self._aliases.update(dict.fromkeys(solver.aliases, solver.name))
        return solver

    def __getitem__(self, name: str) -> Solver:
        name = self._aliases.get(name, name)
        if name not in self._entries:
            raise KeyError(unknown("solver", name, [*self._entries, *self._aliases]))
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


_DDIM = "Denoising Diffusion Implicit Models, 2010.02502, eq. 12 (eta = 0)"
_DPM = "DPM-Solver, 2206.00927, appendix"
_DPMPP = "DPM-Solver++, 2211.01095"
_UNIPC = "UniPC, 2302.04867, algorithms 1 and 2"
_DEIS = "Fast Sampling with Exponential Integrator, 2204.13902, eq. 14"
_AB = "exponential Adams-Bashforth, exact weights; compare 2211.01095, 2310.13268"
_RK = "explicit Runge-Kutta"
_RHO_RK = "Fast Sampling with Exponential Integrator, 2204.13902, rhoRK"
_EDM = "EDM, 2206.00364"
_COX = "Exponential time differencing (Cox and Matthews 2002)"
_GROWS = "few and long steps: errors of the noise prediction grow as e^h"
_SLOPE = "few and long steps: the slope where sigma is small stands for all of a step in rho"
_LINEAR = "steps longer than about 2 in lambda: not an exponential method, for short steps"
_DDPM = "Denoising Diffusion Probabilistic Models, 2006.11239, algorithm 2"
_SDE_PP = f"{_DPMPP}, SDE-DPM-Solver++"
_UNGUARDED = "a step that is many times longer than those before: three nodes amplify errors"
_NOISE_SDE = "few and long steps: the noise of a step is larger than its end allows, by up to e^h"


def _unipc(
    p: int, second: Second, name: str, variant: str, aliases: tuple[str, ...] = ()
) -> Multistep:
    return exponential(
        p,
        second=second,
        corrector=True,
        lower_final=True,
        growth=inf,
        name=name,
        source=f"{_UNIPC}, {variant}",
        aliases=aliases,
    )


# Names from the literature are the published method to the letter: no guard (growth = inf).
solvers = Registry(
    exponential(1, name="ddim", source=_DDIM, aliases=("euler", "dpm_solver_1", "dpmpp_1m")),
    exponential(2, second="midpoint", growth=inf, name="dpmpp_2m", source=f"{_DPMPP}, algorithm 2"),
    exponential(
        2, growth=inf, name="dpmpp_2m_heun", source=f"{_DPMPP}, official code", aliases=("ab2",)
    ),
    exponential(
        3,
        second="midpoint",
        third="shipped",
        growth=inf,
        name="dpmpp_3m_shipped",
        source=f"{_DPMPP}, as every code base ships it: second order",
    ),
    exponential(3, name="dpmpp_3m", source=f"{_DPMPP}, corrected", aliases=("ab3",)),
    exponential(4, name="ab4", source=_AB),
    exponential(2, form="noise", second="midpoint", growth=inf, name="dpm_solver_2m", source=_DPM),
    *(exponential(p, form="noise", name=f"noise_ab{p}", source=_AB) for p in (2, 3, 4)),
    *(_unipc(p, "midpoint", f"unipc_{p}", "bh2", ("unipc",) * (p == 2)) for p in (1, 2, 3)),
    *(_unipc(p, "bh1", f"unipc_{p}_bh1", "bh1") for p in (1, 2, 3)),
    *(_unipc(p, "exact", f"unipc_{p}_vary", "vary_coeff, corrected") for p in (1, 2, 3)),
    exponential(2, form="flow", variable="own", corrector=True, name="flow_pc2", source=_AB),
    *(exponential(p, form="v", variable="own", name=f"v_ab{p}", source=_AB) for p in (2, 3, 4)),
    *(
        exponential(p, form="flow", variable="own", name=f"flow_ab{p}", source=_AB)
        for p in (2, 3, 4)
    ),
    exponential(2, form="flow", name="flow_exp2", source=_AB),
    gaussian(2, 0.5, name="cflow_ab2"),
    *(gaussian(p, 0.5, corrector=True, name=f"cflow_pc{p}") for p in (1, 2)),
    *(gaussian(p, 0.5, form="v", name=f"angle_ab{p}") for p in (1, 2, 3)),
    *(
        exponential(
            q + 1, form="noise", variable="t", growth=inf, name=f"deis_tab{q}", source=_DEIS
        )
        for q in (1, 2, 3)
    ),
    *(
        exponential(
            q + 1,
            form="noise",
            variable="rho",
            growth=inf,
            name=f"deis_rhoab{q}",
            source=_DEIS,
            aliases=(f"lms{q + 1}", *("ipndm_v",) * (q == 3)),
        )
        for q in (1, 2, 3)
    ),
    # Several evaluations per step.
    singlestep(
        2,
        form="noise",
        name="dpm_solver_2",
        source="DPM-Solver, 2206.00927, algorithm 1",
        fragile=_GROWS,
        aliases=("dpm_2",),
    ),
    singlestep(
        3,
        form="noise",
        name="dpm_solver_3",
        source="DPM-Solver, 2206.00927, algorithm 2 and appendix ('fast')",
        fragile=_GROWS,
        aliases=("dpm_fast", "dpm_solver_fast"),
    ),
    singlestep(2, name="dpmpp_2s", source=f"{_DPMPP}, algorithm 1"),
    singlestep(3, name="dpmpp_3s", source=f"{_DPMPP}, official code"),
    singlestep(
        2,
        second="exact",
        name="dpmpp_2s_taylor",
        source="Refined Exponential Solver, 2308.02157, c_2 = 1/2",
        aliases=("res_2s",),
    ),
    singlestep(3, second="exact", name="dpmpp_3s_taylor", source=f"{_DPMPP}, official code"),
    exponential_runge_kutta("etd2rk", name="etd2rk", source=_COX),
    exponential_runge_kutta("etd3rk", name="etd3rk", source=_COX),
    exponential_runge_kutta(
        "krogstad",
        name="etdrk4_krogstad",
        source="Generalized integrating factor methods (Krogstad 2005)",
    ),
    exponential_runge_kutta(
        "hochbruck_ostermann",
        name="ho5",
        source="Explicit exponential Runge-Kutta (Hochbruck and Ostermann 2005)",
    ),
    runge_kutta(
        "2heun",
        name="heun",
        source=f"{_EDM}, algorithm 1",
        fragile=_SLOPE,
        aliases=("edm_heun", "deis_rho_2heun"),
    ),
    runge_kutta("midpoint", name="rho_midpoint", source=f"{_EDM}, appendix: alpha = 1/2"),
    runge_kutta(
        "3kutta", name="rho_rk3", source=_RHO_RK, fragile=_SLOPE, aliases=("deis_rho_3kutta",)
    ),
    runge_kutta("4rk", name="rho_rk4", source=_RHO_RK, fragile=_SLOPE, aliases=("deis_rho_4rk",)),
    runge_kutta("midpoint", form="flow", name="flow_midpoint", source=f"{_RK} in flow time"),
    runge_kutta("2heun", form="flow", name="flow_heun", source=f"{_RK} in flow time"),
    runge_kutta("4rk", form="flow", name="flow_rk4", source=f"{_RK} in flow time"),
    runge_kutta("3kutta", form="lambda", name="rk3", source=f"{_RK}, Kutta", fragile=_LINEAR),
    runge_kutta("4rk", form="lambda", name="rk4", source=f"{_RK}, classical", fragile=_LINEAR),
    runge_kutta(
        "dormand_prince",
        form="lambda",
        name="rk5",
        source=f"{_RK}, Dormand and Prince",
        fragile=_LINEAR,
    ),
    pndm(4, 4, name="pndm", aliases=("f_pndm",)),
    pndm(2, 2, name="s_pndm"),
    pndm(4, 2, name="plms"),
    # DPM-Solver-v3 without calibration, as its authors set it for unguided pixels, for guided or
    # latent models, and for 5 evaluations or fewer.
    dpm_solver_v3(name="dpm_solver_v3"),
    dpm_solver_v3(order=2, corrector_pseudo=True, name="dpm_solver_v3_2"),
    dpm_solver_v3(pseudo=True, name="dpm_solver_v3_pseudo"),
)


def as_solver(solver: str | Solver) -> Solver:
    """Look a solver up by name."""
    if isinstance(solver, Solver):
        return solver
    if not isinstance(solver, str):
        raise ValueError(f"solver = {solver!r}; give a name, a solver or a plan")
    try:
        return solvers[solver]
    except KeyError as error:
        raise ValueError(error.args[0]) from None


# Made from the solvers above.
for _made in (
    *(ipndm(p, aliases=("ipndm",) * (p == 4)) for p in (2, 3, 4)),
    ipndm(2, form="flow"),
    ghvb(2, 0.8, name="ghvb_1_8"),
    ghvb(4, 0.8, name="ghvb_3_8"),
    heavy_ball(ipndm(4), 0.9, name="hb_ipndm_4"),
    heavy_ball("dpmpp_2m", 0.9, plain=2, name="hb_dpmpp_2m"),
    dualfast("ddim", name="dualfast_ddim"),
    dualfast("dpmpp_2m", name="dualfast_dpmpp_2m"),
    bdia("ddim", 0.5, name="bdia", aliases=("bdia_ddim",)),
    bdia("ddim", 1.0, name="bdia_1"),
    bdia("ddim", "per step", name="bdia_per_step"),
    bdia("dpmpp_2m", 0.5, name="bdia_dpmpp_2m"),
    bdia("heun", 0.5, name="bdia_heun"),
    edict(name="edict"),
    reversible_heun(name="reversible_heun"),
    sde(
        1,
        name="ddpm",
        source=f"{_DDPM}, small variance",
        member="ddim",
        aliases=("euler_ancestral", "sde_dpmpp_1"),
    ),
    ancestral(variance="large", name="ddpm_large", source=f"{_DDPM}, sigma^2 = beta"),
    ancestral(0.5, name="ddim_eta_0_5"),
    sde(
        2,
        second="midpoint",
        growth=inf,
        name="sde_dpmpp_2m",
        source=f"{_SDE_PP}(2M)",
        member="dpmpp_2m",
        aliases=("dpmpp_2m_sde",),
    ),
    sde(
        2,
        growth=inf,
        name="sde_dpmpp_2m_heun",
        source=f"{_SDE_PP}(2M), exact weights",
        member="dpmpp_2m_heun",
        aliases=("dpmpp_2m_sde_heun",),
    ),
    exponential(
        3,
        third="shipped",
        growth=inf,
        name="dpmpp_3m_shipped_heun",
        source=f"{_DPMPP}, as k-diffusion ships it: second order",
    ),
    sde(3, name="sde_dpmpp_3m", source=f"{_SDE_PP}, three nodes (ours)", member="dpmpp_3m"),
    sde(
        3,
        third="shipped",
        growth=inf,
        name="sde_dpmpp_3m_shipped",
        source=f"{_SDE_PP}, three nodes as k-diffusion ships it",
        fragile=_UNGUARDED,
        member="dpmpp_3m_shipped_heun",
        aliases=("dpmpp_3m_sde",),
    ),
    sde(
        1,
        form="noise",
        name="sde_dpm_solver_1",
        source=f"{_DPMPP}, SDE-DPM-Solver-1",
        fragile=_NOISE_SDE,
        member="ddim",
    ),
    sde(
        2,
        form="noise",
        second="midpoint",
        growth=inf,
        name="sde_dpm_solver_2m",
        source=f"{_DPMPP}, SDE-DPM-Solver-2M",
        fragile=_NOISE_SDE,
        member="dpm_solver_2m",
    ),
    # Exact weights: with "bh1" the corrector of a long first step is far worse than first order.
    sa_solver(3, 4, second="exact", name="sa_solver", member="unipc_3_vary"),
    sa_solver(2, 2, second="exact", name="sa_solver_2", member="sa_ode_2"),
    sa_solver(2, 2, eta2=0.0, second="exact", name="sa_ode_2"),
    *(er_sde(p, name=f"er_sde_{p}") for p in (1, 2, 3)),
    *(er_sde(p, phi=1.0, name=f"er_ode_{p}") for p in (2, 3)),
    jump(name="lcm", aliases=("consistency",)),
    jump(0.3, to="time", name="tcd", source="Trajectory Consistency Distillation, 2402.19159"),
    seeds("dpmpp_2s_taylor", name="seeds_2"),
    seeds("dpmpp_3s", name="seeds_3"),
    seeds("dpm_solver_2", name="seeds_2_noise"),
    seeds("dpm_solver_3", name="seeds_3_noise"),
    seeds("dpmpp_2s", name="sde_dpmpp_2s", source="SEEDS-2, 2305.14267, with phi_1 as in ComfyUI"),
    dpmpp_sde(name="dpmpp_sde"),
    ancestral_singlestep("dpmpp_2s", name="dpmpp_2s_ancestral"),
    ancestral_singlestep(
        "dpm_solver_2", name="dpm_2_ancestral", source="k-diffusion, sample_dpm_2_ancestral"
    ),
    churn("heun", name="edm_churn", aliases=("heun_churn",)),
    churn("ddim", name="euler_churn"),
    restart("heun", name="restart"),
    predictor_corrector("ddim", name="pc_langevin"),
    flow_grpo(name="flow_grpo"),
):
    solvers.register(_made)
