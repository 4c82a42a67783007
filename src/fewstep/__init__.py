"""fewstep: sample pretrained diffusion and flow models in few network evaluations.

    import fewstep as fs

    denoiser = fs.Denoiser(network, process=fs.VP(), predicts="noise")
    images = fs.sample(denoiser, (16, 3, 32, 32), solver="dpmpp_2m", nfe=8, seed=0)
    print(fs.plan("dpmpp_2m", fs.VP(), nfe=8))

`fs.solvers` maps names to solvers, `fs.grids` names to time grids; `fs.exact` holds models whose
answers are known, `fs.models` the bundled networks.
"""

from . import exact, models
from ._denoiser import Denoiser, Guided, Model
from ._grid_search import CostGrid, dmn, gits
from ._grid_tables import NodeList, node_lists
from ._grids import Grid, arctan, beta, grids, karras, power, replaced, shifted, softened, tabulated
from ._noise import start_noise
from ._plan import Call, Hook, Plan, Row, State
from ._prediction import Prediction, convert, edm, predictions
from ._process import EDM, VE, VP, CosineVP, Custom, DiscreteVP, Flow, Level, Process
from ._sampling import Record, plan, sample, steps
from ._segment import add_noise
from ._solvers._base import Draft, Formula, Multistep, Solver
from ._solvers._exponential import exponential
from ._solvers._registry import solvers
from ._version import __version__
from ._weights import weights

__all__ = [
    "EDM",
    "VE",
    "VP",
    "Call",
    "CosineVP",
    "CostGrid",
    "Custom",
    "Denoiser",
    "DiscreteVP",
    "Draft",
    "Flow",
    "Formula",
    "Grid",
    "Guided",
    "Hook",
    "Level",
    "Model",
    "Multistep",
    "NodeList",
    "Plan",
    "Prediction",
    "Process",
    "Record",
    "Row",
    "Solver",
    "State",
    "__version__",
    "add_noise",
    "arctan",
    "beta",
    "convert",
    "dmn",
    "edm",
    "exact",
    "exponential",
    "gits",
    "grids",
    "karras",
    "models",
    "node_lists",
    "plan",
    "power",
    "predictions",
    "replaced",
    "sample",
    "shifted",
    "softened",
    "solvers",
    "start_noise",
    "steps",
    "tabulated",
    "weights",
]
