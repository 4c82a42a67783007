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
from ._grids import Grid, beta, grids, karras, power, softened
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
    "Plan",
    "Prediction",
    "Process",
    "Record",
    "Row",
    "Solver",
    "State",
    "__version__",
    "add_noise",
    "beta",
    "convert",
    "edm",
    "exact",
    "exponential",
    "grids",
    "karras",
    "models",
    "plan",
    "power",
    "predictions",
    "sample",
    "softened",
    "solvers",
    "start_noise",
    "steps",
    "weights",
]
