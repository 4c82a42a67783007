"""fewstep: sample pretrained diffusion and flow models in few network evaluations.

    import fewstep as fs

    denoiser = fs.Denoiser(network, process=fs.VP(), predicts="noise")
    images = fs.sample(denoiser, (16, 3, 32, 32), solver="dpmpp_2m", nfe=8, seed=0)
    print(fs.plan("dpmpp_2m", fs.VP(), nfe=8))

`fs.solvers` maps names to solvers, `fs.grids` names to time grids; `fs.exact` holds models whose
answers are known, `fs.models` the bundled networks.
"""

from . import exact, models
from ._adaptive import AdaptiveResult, sample_adaptive
from ._analysis import ErrorConstant, Orders, Stability
from ._analytic import analytic_first, begin_analytically
from ._basis import Basis, Channel, Cosine, Identity, LowRank
from ._compiled import Compiled, compiled
from ._denoiser import Denoiser, Guided, Model
from ._grid_search import CostGrid, dmn, gits
from ._grid_tables import NodeList, node_lists
from ._grids import Grid, arctan, beta, grids, karras, power, replaced, shifted, softened, tabulated
from ._hooks import chain, clip, dynamic_threshold
from ._noise import start_noise
from ._plan import Call, Hook, Plan, Row, State
from ._prediction import Prediction, convert, edm, predictions
from ._process import EDM, VE, VP, CosineVP, Custom, DiscreteVP, Flow, Level, Process
from ._sampling import Record, plan, sample, steps
from ._segment import add_noise
from ._shifted import TimeShifted
from ._solvers._base import Draft, Formula, Multistep, Solver
from ._solvers._exponential import exponential
from ._solvers._gaussian import gaussian
from ._solvers._momentum import dualfast, ghvb, heavy_ball, ipndm, unic
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
from ._solvers._singlestep import Singlestep, singlestep
from ._statistics import Statistics, scales_from_data, scales_from_jacobian, scales_from_model
from ._version import __version__
from ._weights import weights

__all__ = [
    "EDM",
    "VE",
    "VP",
    "AdaptiveResult",
    "Basis",
    "Call",
    "Channel",
    "Compiled",
    "Cosine",
    "CosineVP",
    "CostGrid",
    "Custom",
    "Denoiser",
    "DiscreteVP",
    "Draft",
    "ErrorConstant",
    "Flow",
    "Formula",
    "Grid",
    "Guided",
    "Hook",
    "Identity",
    "Level",
    "LowRank",
    "Model",
    "Multistep",
    "NodeList",
    "Orders",
    "PhiTable",
    "Plan",
    "Prediction",
    "Process",
    "Record",
    "Row",
    "Singlestep",
    "Solver",
    "Stability",
    "Started",
    "State",
    "Statistics",
    "Tableau",
    "TimeShifted",
    "__version__",
    "add_noise",
    "analytic_first",
    "arctan",
    "bdia",
    "begin_analytically",
    "beta",
    "chain",
    "clip",
    "compiled",
    "convert",
    "dmn",
    "dualfast",
    "dynamic_threshold",
    "edict",
    "edm",
    "exact",
    "exponential",
    "exponential_runge_kutta",
    "gaussian",
    "ghvb",
    "gits",
    "grids",
    "heavy_ball",
    "ipndm",
    "karras",
    "models",
    "node_lists",
    "phi_tables",
    "plan",
    "pndm",
    "power",
    "predictions",
    "replaced",
    "reversible_heun",
    "runge_kutta",
    "sample",
    "sample_adaptive",
    "scales_from_data",
    "scales_from_jacobian",
    "scales_from_model",
    "second_state",
    "shifted",
    "singlestep",
    "softened",
    "solvers",
    "start_noise",
    "started",
    "steps",
    "tableaus",
    "tabulated",
    "unic",
    "walk",
    "weights",
]
