"""fewstep: sample pretrained diffusion and flow models in few network evaluations.

    import fewstep as fs

    denoiser = fs.Denoiser(network, process=fs.VP(), predicts="noise")
    images = fs.sample(denoiser, (16, 3, 32, 32), solver="dpmpp_2m", nfe=8, seed=0)
    print(fs.plan("dpmpp_2m", fs.VP(), nfe=8))

`fs.solvers` maps names to solvers, `fs.grids` names to time grids; `fs.exact` holds models whose
answers are known, `fs.models` the bundled networks.
"""

from typing import Any

from . import exact, metrics, models
from ._adaptive import AdaptiveResult, sample_adaptive
from ._analysis import ErrorConstant, Orders, Stability
from ._analytic import analytic_first, begin_analytically
from ._basis import Basis, Channel, Cosine, Identity, LowRank
from ._batch import Batch, batch
from ._calibrate._calibrate import calibrate
from ._calibrate._compensate import Cascade, Compensation, compensated, fit_ratios
from ._calibrate._diagnose import Diagnosis, Hypothesis, diagnose
from ._calibrate._ems import EMS
from ._calibrate._learn import Learned, learn
from ._calibrate._recipe import Candidate, Recipe
from ._calibrate._robustness import Robustness, robustness
from ._calibrate._schedule import Choice, Schedule, schedule_of
from ._calibrate._search import Searched, search
from ._calibrate._statistics import estimate_ems
from ._calibrate._teacher import Teacher, teach
from ._checkpoints import load_checkpoint
from ._cld import CLD, CLDPlan, CLDStep, sample_cld
from ._compare._compare import compare
from ._compare._numbers import Comparison
from ._compare._recommend import Recommendation, recommend
from ._compiled import Compiled, compiled
from ._convert import convert_checkpoint
from ._denoiser import Denoiser, Guided, Model
from ._gddim import Blurring, dissipation
from ._generate import generate
from ._grid_search import CostGrid, dmn, gits
from ._grid_tables import NodeList, node_lists
from ._grids import Grid, arctan, beta, grids, karras, power, replaced, shifted, softened, tabulated
from ._hooks import chain, clip, dynamic_threshold
from ._interpolant import Gamma, Interpolant, gammas
from ._langevin import (
    GibbsSample,
    denoising_gibbs,
    langevin,
    sample_corrected,
    sample_levenberg,
)
from ._mean_reverting import Centred, MeanReverting, restore
from ._noise import BrownianPath, Draw, Noise, Source, start_noise
from ._ode import ProbabilityFlow, probability_flow
from ._on_path import on_path
from ._pfgm import PFGM
from ._plan import Call, Hook, Plan, Row, State
from ._prediction import Prediction, convert, edm, predictions, velocity
from ._process import EDM, VE, VP, CosineVP, Custom, DiscreteVP, Flow, Level, Process
from ._sampling import Record, plan, sample, steps
from ._segment import add_noise
from ._shifted import TimeShifted
from ._solvers._base import Draft, Formula, Multistep, Solver
from ._solvers._exponential import exponential
from ._solvers._flow_sde import flow_grpo, noise_in_steps
from ._solvers._gaussian import gaussian
from ._solvers._momentum import dualfast, ghvb, heavy_ball, ipndm, unic
from ._solvers._noisy import churn, predictor_corrector, restart
from ._solvers._pndm import Started, pndm, started
from ._solvers._registry import solvers
from ._solvers._reversible import bdia, edict, reversible_heun, second_state, walk
from ._solvers._runge_kutta import (
    PhiTable,
    Tableau,
    exponential_runge_kutta,
    phi_tables,
    runge_kutta,
    tableaus,
)
from ._solvers._seeds import ancestral_singlestep, dpmpp_sde, seeds
from ._solvers._singlestep import Singlestep, singlestep
from ._solvers._stochastic import Window, ancestral, er_sde, jump, sa_solver, sde
from ._solvers._v3 import dpm_solver_v3
from ._stacked import stacked
from ._statistics import Statistics, scales_from_data, scales_from_jacobian, scales_from_model
from ._transition import Transition
from ._tree import Tree, TreeState, tree
from ._version import __version__
from ._weights import weights

__all__ = [
    "CLD",
    "EDM",
    "EMS",
    "PFGM",
    "VE",
    "VP",
    "AdaptiveResult",
    "Basis",
    "Batch",
    "Blurring",
    "BrownianPath",
    "CLDPlan",
    "CLDStep",
    "Call",
    "Candidate",
    "Cascade",
    "Centred",
    "Channel",
    "Choice",
    "Comparison",
    "Compensation",
    "Compiled",
    "Cosine",
    "CosineVP",
    "CostGrid",
    "Custom",
    "Denoiser",
    "Diagnosis",
    "DiscreteVP",
    "Draft",
    "Draw",
    "ErrorConstant",
    "Flow",
    "Formula",
    "Gamma",
    "GibbsSample",
    "Grid",
    "Guided",
    "Hook",
    "Hypothesis",
    "Identity",
    "Interpolant",
    "Learned",
    "Level",
    "LowRank",
    "MeanReverting",
    "Model",
    "Multistep",
    "NodeList",
    "Noise",
    "Orders",
    "PhiTable",
    "Plan",
    "Prediction",
    "ProbabilityFlow",
    "Process",
    "Recipe",
    "Recommendation",
    "Record",
    "Robustness",
    "Row",
    "Schedule",
    "Searched",
    "Singlestep",
    "Solver",
    "Source",
    "Stability",
    "Started",
    "State",
    "Statistics",
    "Tableau",
    "Teacher",
    "TimeShifted",
    "Transition",
    "Tree",
    "TreeState",
    "Window",
    "__version__",
    "add_noise",
    "analytic_first",
    "ancestral",
    "ancestral_singlestep",
    "arctan",
    "batch",
    "bdia",
    "begin_analytically",
    "beta",
    "calibrate",
    "chain",
    "churn",
    "clip",
    "compare",
    "compensated",
    "compiled",
    "convert",
    "convert_checkpoint",
    "denoising_gibbs",
    "diagnose",
    "dissipation",
    "dmn",
    "dpm_solver_v3",
    "dpmpp_sde",
    "dualfast",
    "dynamic_threshold",
    "edict",
    "edm",
    "er_sde",
    "estimate_ems",
    "exact",
    "exponential",
    "exponential_runge_kutta",
    "fit_ratios",
    "flow_grpo",
    "gammas",
    "gaussian",
    "generate",
    "ghvb",
    "gits",
    "grids",
    "heavy_ball",
    "ipndm",
    "jump",
    "karras",
    "langevin",
    "learn",
    "load_checkpoint",
    "metrics",
    "models",
    "node_lists",
    "noise_in_steps",
    "on_path",
    "phi_tables",
    "plan",
    "pndm",
    "power",
    "predictions",
    "predictor_corrector",
    "probability_flow",
    "recommend",
    "replaced",
    "restart",
    "restore",
    "reversible_heun",
    "robustness",
    "runge_kutta",
    "sa_solver",
    "sample",
    "sample_adaptive",
    "sample_cld",
    "sample_corrected",
    "sample_levenberg",
    "scales_from_data",
    "scales_from_jacobian",
    "scales_from_model",
    "schedule_of",
    "sde",
    "search",
    "second_state",
    "seeds",
    "shifted",
    "singlestep",
    "softened",
    "solvers",
    "stacked",
    "start_noise",
    "started",
    "steps",
    "tableaus",
    "tabulated",
    "teach",
    "tree",
    "unic",
    "velocity",
    "walk",
    "weights",
]

#: Public modules that need an extra, loaded when they are first asked for.
_EXTRAS = ("deepinv", "diffusers", "k_diffusion")


def __getattr__(name: str) -> Any:
    import importlib

    if name in _EXTRAS:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "Scheduler":  # pipelines look for it here when they load one that they saved
        return importlib.import_module(f"{__name__}.diffusers").Scheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXTRAS])
