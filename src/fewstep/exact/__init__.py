"""Exact models: distributions whose denoiser is known in closed form under every Gaussian path.

Notation. A path is x = alpha x_0 + sigma eps with eps standard normal. A *level* is the pair
(alpha, sigma); rho = sigma / alpha. D = E[x_0 | x] is the data prediction and E[eps | x] the
noise prediction. All quantities are in the units of the data; densities are in nats.
"""

from ._base import ExactModel
from ._data import digits, patches
from ._models import Empirical, Gaussian, Mixture

__all__ = ["Empirical", "ExactModel", "Gaussian", "Mixture", "digits", "patches"]
