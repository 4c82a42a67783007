r"""Critically damped Langevin diffusion: data x with a momentum v, and gDDIM with 2 x 2 matrices.

    du = F u dt + G dw,    u = (x, v),    beta, M, Gamma, gamma > 0,
    F = beta [[0, 1/M], [-1, -Gamma/M]],  G = (0, sqrt(2 Gamma beta))

starts at (x_0, 0) with covariance Sigma_0 = diag(0, gamma M) and goes to N(0, diag(1, M)). At
critical damping, Gamma^2 = 4 M, with z = 2 beta t / Gamma, in the coordinates (x, v / sqrt(M)),

    Psi = e^-z [[1 + z, z], [-z, 1 - z]],    Sigma_t = I + Psi (Sigma_0 - I) Psi^T

(computed without cancellation: det Sigma vanishes as t^3). The score of u is -R^-T eps, for any
root R R^T = Sigma_t. gDDIM's root is

    dR/dt = (F + 1/2 G G^T Sigma^-1) R:    R = L Q(theta),  dtheta/dz = -sqrt(det Sigma) / Sigma_xx

with L the Cholesky root and Q a rotation. For data at one point its eps is constant along every
trajectory of the ODE; that of L turns by theta, 12 radians from t = 1 to 0. Steps from s to t < s:

    ODE   u_t = Psi u_s + sum_j W_j eps_j,    W_j = 1/2 int_s^t Psi(t, r) G G^T R_r^-T l_j(r) dr
    SDE   u_t = Psi u_s + (Psih - Psi) R_s eps_s + N(0, P),    P = Sigma_t - Psih Sigma_s Psih^T,
          dPsih/dt = (F + (1 + eta^2) / 2 G G^T Sigma^-1) Psih

with l_j the Lagrange polynomials in sqrt(t) of the last evaluations: R is a series in sqrt(t), so
that polynomials in t, the published ones, lose their order toward t = 0. Steps of the ODE have
order 1, 2 or 3, one more if corrected; order 1 is exact for data at one point, as the SDE's steps
are in law. The SDE has weak order 1. One evaluation per step; t = 0 is reached without evaluating
there.

Coefficients are matrices over (x, v). A `Plan` has none: its rows act element by element, and a
call asks about one state, so that x and v can neither share a state nor have one each. `CLD.plan`
makes a plan of its own.

Sources: Score-based generative modeling with critically-damped Langevin diffusion (arXiv
2112.07068); gDDIM: generalized denoising diffusion implicit models (arXiv 2206.05564). The official
gDDIM code integrates dP/dt with Fh P + P Fh in place of Fh P + P Fh^T, Fh the matrix of Psih: it is
not symmetric here, and the result is no covariance.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from numbers import Integral
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ._combine import combine
from ._denoiser import check_output, device_of
from ._noise import Draw, Noise, as_source, start_noise
from ._prediction import unknown
from ._process import Array, Level
from ._sampling import _Watch

__all__ = ["CLD", "CLDPlan", "CLDStep", "sample_cld"]

_PREDICTS, _ROOTS = ("noise", "cholesky", "score"), ("gddim", "cholesky")
_X, _W = np.polynomial.legendre.leggauss(14)
_X, _W = 0.5 * (_X + 1), 0.5 * _W
#: Everything is a series in sqrt(z): what is left out below this is nothing in float64.
_TINY = 2.0**-106
_EARLIEST = 1e-12
#: e^y - 1 - y - y^2 / 2, for y <= 1.
_SERIES = [0.0, 0.0, 0.0, *(1 / math.factorial(k) for k in range(3, 20))]


def _collocation() -> Array:
    """a[i, j] = int_0^{x_i} l_j: Gauss's implicit Runge-Kutta method."""
    legendre = np.polynomial.legendre.Legendre
    basis = [legendre.basis(k, domain=[0, 1]) for k in range(len(_X))]
    values = np.array([[p(x) for p in basis] for x in _X])
    integrals = np.array([[p.integ(lbnd=0)(x) for p in basis] for x in _X])
    return integrals @ np.linalg.inv(values)


_A = _collocation()


def _panels(low: float, high: float) -> Array:
    """Edges from low to high > low, a factor of 2 apart at most, and 1/2 at most: integrands are
    analytic functions of log z for small z, and of z."""
    low = max(low, _TINY)
    first, last = math.floor(math.log2(low)) + 1, math.ceil(2 * high)
    edges = np.concatenate([2.0 ** np.arange(first, 0), 0.5 * np.arange(1, last)])
    return np.concatenate([[low], edges[(edges > low) & (edges < high)], [high]])


def _panel_nodes(edges: Array) -> tuple[Array, Array]:
    """Gauss-Legendre nodes and weights in every panel, (panels, nodes)."""
    width = np.diff(edges)[:, None]
    return edges[:-1, None] + width * _X, width * _W


def _matrix(a: Any, b: Any, c: Any, d: Any) -> Array:
    """[[a, b], [c, d]], for arrays too: (..., 2, 2)."""
    entries = np.broadcast_arrays(*(np.asarray(v, dtype=np.float64) for v in (a, b, c, d)))
    return np.stack(entries, -1).reshape(*entries[0].shape, 2, 2)


def _psi(z: Any) -> Array:
    return np.exp(-np.asarray(z))[..., None, None] * _matrix(1 + z, z, -z, 1 - z)


def _rotation(theta: Any) -> Array:
    c, s = np.cos(theta), np.sin(theta)
    return _matrix(c, -s, s, c)


@dataclass(frozen=True)
class CLD:
    """The process. States u are (batch, 2, ...) with x = u[:, 0], v = u[:, 1]: `u.flatten(1, 2)` is
    the layout of CLD's networks (channels doubled), `u.movedim(1, -1)` that of gDDIM's.

    beta, mass, friction, gamma: beta, M, Gamma and gamma of the formulas, as published by default.
        friction^2 = 4 mass: other dampings are refused.
    jitter: a variance added to x and v at t = 0; gDDIM's networks were trained with 1e-6.
    t_start, t_end: where runs start, and end unless told otherwise.

    Matrices are float64 over (x, v), (..., 2, 2) for times of shape (...).
    """

    beta: float = 4.0
    mass: float = 0.25
    friction: float = 1.0
    gamma: float = 0.04
    jitter: float = 0.0
    t_start: float = 1.0
    t_end: float = 0.0

    def __post_init__(self) -> None:
        for name in ("beta", "mass", "friction", "gamma"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name} = {value}; need a positive finite number")
        if not math.isclose(self.friction**2, 4 * self.mass, rel_tol=1e-9):
            raise ValueError(
                f"friction = {self.friction} with mass = {self.mass}; need critical damping, "
                f"friction^2 = 4 mass (friction = {2 * math.sqrt(self.mass):g})"
            )
        if not 0 <= self.jitter < math.inf:
            raise ValueError(f"jitter = {self.jitter}; need a finite variance >= 0")
        if not 0 <= self.t_end < self.t_start < math.inf:
            raise ValueError(
                f"t_start, t_end = {self.t_start}, {self.t_end}; need finite t_start > t_end >= 0"
            )

    # -- in z and (x, w), where beta and the mass are 1 --------------------------------------------

    def _z(self, t: ArrayLike) -> Any:
        return np.asarray(t, dtype=np.float64) * (2 * self.beta / self.friction)

    @cached_property
    def _units(self) -> Array:
        """u = units (x, w)."""
        return np.diag([1.0, math.sqrt(self.mass)])

    @cached_property
    def _start(self) -> tuple[float, float]:
        """Variances of x and w at t = 0."""
        return self.jitter, self.gamma + self.jitter / self.mass

    def _moments(self, z: Any) -> tuple[Any, Any, Any, Any]:
        """xx, xw, ww and determinant of the covariance, each a sum of positive terms but for
        differences that lose a digit at most."""
        z = np.asarray(z, dtype=np.float64)
        y, e, (d, s) = 2 * z, np.exp(-2 * z), self._start
        series = np.polynomial.polynomial.polyval(np.minimum(y, 1.0), _SERIES)
        qxx = np.where(y < 1, e * series, 1 - e * (1 + y + y * y / 2))
        qxw, qww = e * y * y / 2, e * (y - y * y / 2) - np.expm1(-y)
        columns = np.moveaxis(_psi(z), (-2, -1), (0, 1))
        xx, xw, ww, det = qxx, qxw, qww, qxx * qww - qxw**2 + d * s * e * e
        for variance, (a, b) in zip((d, s), columns.swapaxes(0, 1), strict=True):
            xx, xw, ww = xx + variance * a * a, xw + variance * a * b, ww + variance * b * b
            det = det + variance * (qww * a * a - 2 * qxw * a * b + qxx * b * b)
        return xx, xw, ww, det

    def _cholesky(self, z: Any) -> Array:
        xx, xw, _, det = self._moments(np.maximum(z, _TINY))
        a = np.sqrt(xx)
        return _matrix(a, 0.0, xw / a, np.sqrt(det) / a)

    def _rate(self, z: Any) -> Any:
        xx, _, _, det = self._moments(z)
        return -np.sqrt(det) / xx

    def _theta(self, z: Any) -> Any:
        """The angle of R = L Q(theta), such that R_0 = diag(sqrt(jitter), ...)."""
        z = np.maximum(np.asarray(z, dtype=np.float64), _TINY)
        edges, table = _angles(self, math.ceil(z.max()))
        i = np.clip(np.searchsorted(edges, z, side="right") - 1, 0, len(edges) - 2)
        width = (z - edges[i])[..., None]
        rest = (width * _W * self._rate(edges[i][..., None] + width * _X)).sum(-1)
        return table[i] + rest - (0.0 if self.jitter else math.pi / 2)

    def _normal(self, z: Any, root: str) -> Array:
        """The only row of R^-T that G G^T leaves: (..., 2)."""
        theta = self._theta(z) if root == "gddim" else np.zeros_like(z)
        direction = np.stack([np.sin(theta), np.cos(theta)], -1)
        return direction / self._cholesky(z)[..., 1, 1][..., None]

    def _contraction(self, s: float, t: float, eta: float) -> Array:
        """Psih = R_t C R_s^-1, dC/dz = 2 eta^2 n n^T C: n is a row of R^-T."""
        edges = _panels(t, s)
        n = self._normal(_panel_nodes(edges)[0][:, ::-1], "gddim")  # from the top down
        slopes = 2 * eta**2 * n[..., :, None] * n[..., None, :]
        size, h = 2 * len(_X), -np.diff(edges)[:, None, None, None]
        # K_i = S_i (C + h sum_j a_ij K_j), then C' = C + h sum_j b_j K_j, in all panels at once.
        system = np.eye(size) - np.einsum("pijk,il->pijlk", h * slopes, _A).reshape(-1, size, size)
        K = np.linalg.solve(system, slopes.reshape(-1, size, 2)).reshape(slopes.shape)
        steps = np.eye(2) + h[:, 0] * np.einsum("i,pijk->pjk", _W, K)
        out = np.eye(2)
        for step in steps[::-1]:
            out = step @ out
        return out

    # -- in t and (x, v) ---------------------------------------------------------------------------

    def psi(self, t: ArrayLike, s: ArrayLike) -> Array:
        """Psi(t, s): what means do from s to t."""
        return self._units @ _psi(self._z(t) - self._z(s)) @ np.linalg.inv(self._units)

    def covariance(self, t: ArrayLike) -> Array:
        """Sigma_t, around the mean psi(t, 0) (x_0, 0)."""
        xx, xw, ww, _ = self._moments(self._z(t))
        return self._units @ _matrix(xx, xw, xw, ww) @ self._units

    def root(self, t: ArrayLike, kind: str = "gddim") -> Array:
        """R with R R^T = Sigma_t: gDDIM's, whose networks are trained on u = psi(t, 0) (x_0, 0) +
        R eps to predict eps, or the lower triangular one ("cholesky")."""
        if kind not in _ROOTS:
            raise ValueError(unknown("kind", str(kind), _ROOTS))
        z = self._z(t)
        R = self._cholesky(z)
        if kind == "gddim":
            start = np.diag(np.sqrt(self._start))
            R = np.where((z == 0)[..., None, None], start, R @ _rotation(self._theta(z)))
        return self._units @ R

    def level(self, t: float) -> Level:
        """alpha and sigma of x alone."""
        z = self._z(t)
        alpha, sigma = float(_psi(z)[0, 0]), math.sqrt(self._moments(z)[0])
        return Level(float(t), alpha, sigma, math.log(alpha / sigma) if sigma else math.inf)

    def plan(
        self,
        nfe: int | None = None,
        *,
        order: int = 2,
        corrector: bool = False,
        eta: float = 0.0,
        predicts: str = "noise",
        root: str = "gddim",
        times: Sequence[float] | None = None,
    ) -> CLDPlan:
        """The run as a plan.

        nfe: evaluations, one per step; steps are equal in sqrt(t) from t_start to t_end.
        order: 1, 2 or 3 evaluations in a step of the ODE; the first steps have what there is (near
            the prior gDDIM's eps hardly varies, that of the other root does).
        corrector: before a step, its start is made again with the evaluation there too (Adams-
            Moulton, order + 1), which is not repeated.
            Steps that are too long at large t magnify errors of the network, with the corrector up
            to 1e9 times. They do not with 5 steps of order 1, 12 of 2, 30 of 3; corrected, with 40
            of order 1, 60 of 2, 100 of 3.
        eta: noise level of the SDE, gDDIM's lambda; 0: ODE. Needs order = 1.
        predicts: the network's output, (batch, 2, ...): "noise", eps of gDDIM's root; "cholesky",
            eps of the other; "score". CLD's networks know the v part of the last two alone; with
            "cholesky" and root = "cholesky" the x part is not used.
        root: whose eps is replaced by a polynomial.
        times: nodes instead of nfe, falling; evaluated at all but the last.
        """
        nodes = self._nodes(nfe, times)
        if order not in (1, 2, 3) or isinstance(order, bool):
            raise ValueError(f"order = {order!r}; accepted: 1, 2, 3")
        if not 0 <= eta < math.inf:
            raise ValueError(f"eta = {eta}; need a finite number >= 0")
        for name, value, known in (("predicts", predicts, _PREDICTS), ("root", root, _ROOTS)):
            if value not in known:
                raise ValueError(unknown(name, str(value), known))
        if eta and (order != 1 or corrector or root != "gddim"):
            raise ValueError(
                f"eta = {eta} with order = {order}, corrector = {corrector}, root = {root!r}; the "
                "SDE has order = 1, no corrector, root = 'gddim'"
            )
        outputs = {t: self._conversion(t, predicts, root) for t in nodes[:-1]}
        steps = []
        for i, (s, t) in enumerate(itertools.pairwise(nodes)):
            psi, past = self.psi(t, s), nodes[max(i + 1 - order, 0) : i + 1][::-1]
            corrections, noise = None, None
            if eta:
                mean, noise = self._stochastic(s, t, eta)
                weights = [mean - psi @ self.root(s)]
            else:
                weights = self._weights(s, t, past, root)
                if corrector and t != nodes[-1]:
                    corrections = self._weights(s, t, [t, *past], root)
                    corrections = [
                        W @ outputs[r] for W, r in zip(corrections, [t, *past], strict=True)
                    ]
            weights = [W @ outputs[r] for W, r in zip(weights, past, strict=True)]
            steps.append(CLDStep(self.level(s), self.level(t), psi, weights, corrections, noise))
        return CLDPlan(self, tuple(steps))

    def _nodes(self, nfe: int | None, times: Sequence[float] | None) -> list[float]:
        if nfe is not None and (isinstance(nfe, bool) or not isinstance(nfe, Integral) or nfe < 1):
            raise ValueError(f"nfe = {nfe!r}; need an integer >= 1")
        if times is None:
            if nfe is None:
                raise ValueError("nfe is missing; give the number of evaluations, or times")
            ends = math.sqrt(self.t_start), math.sqrt(self.t_end)
            inner = np.linspace(*ends, int(nfe) + 1)[1:-1] ** 2
            return [self.t_start, *inner.tolist(), self.t_end]
        nodes = [float(t) for t in times]
        falling = all(s > t for s, t in itertools.pairwise(nodes))
        if len(nodes) < 2 or not falling or not (nodes[-1] >= 0 and nodes[0] < math.inf):
            raise ValueError(f"times = {nodes}; need two or more finite numbers >= 0, falling")
        if nodes[-2] < _EARLIEST:
            raise ValueError(f"times = {nodes}; all but the last must be at least {_EARLIEST}")
        if nfe not in (None, len(nodes) - 1):
            raise ValueError(f"nfe = {nfe}, but these times have {len(nodes) - 1} steps; leave out")
        return nodes

    def _conversion(self, t: float, predicts: str, root: str) -> Array:
        """C with eps = C out, for eps of this root."""
        if predicts == "score":
            return -self.root(t, root).T
        if predicts == ("noise" if root == "gddim" else "cholesky"):
            return np.eye(2)
        turn = _rotation(self._theta(self._z(t)))
        return turn if predicts == "noise" else turn.T

    def _weights(self, s: float, t: float, past: Sequence[float], root: str) -> list[Array]:
        """W of the evaluations at these times, for one step."""
        z, dz = (v.ravel() for v in _panel_nodes(_panels(self._z(t), self._z(s))))
        kernel = _psi(self._z(t) - z)[:, :, 1, None] * self._normal(z, root)[:, None, :]
        r, p = np.sqrt(z), np.sqrt(self._z(past))
        out = []
        for j in range(len(p)):
            others = np.delete(p, j)
            l = np.prod((r[:, None] - others) / (p[j] - others), axis=1)
            out.append(-2 * self._units @ np.einsum("n,nij->ij", dz * l, kernel))
        return out

    def _stochastic(self, s: float, t: float, eta: float) -> tuple[Array, Array]:
        """Psih(t, s) R_s, and the symmetric root of P in the frame of R_t."""
        C, R = self._contraction(self._z(s), self._z(t), eta), self.root(t)
        values, vectors = np.linalg.eigh(np.eye(2) - C @ C.T)
        return R @ C, R @ (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


@lru_cache(maxsize=64)
def _angles(process: CLD, top: int) -> tuple[Array, Array]:
    """Panels up to z = top, and the integral of dtheta/dz up to each edge."""
    edges = _panels(_TINY, float(top))
    nodes, weights = _panel_nodes(edges)
    return edges, np.cumsum(np.concatenate([[0.0], (weights * process._rate(nodes)).sum(1)]))


@dataclass(frozen=True, eq=False)
class CLDStep:
    """u_t = psi u_s + sum_j weights[j] out[j] + noise Z, outputs newest first; and the same for the
    corrected u_t, with the output there in front (None: not corrected)."""

    start: Level
    end: Level
    psi: Array
    weights: Sequence[Array]
    corrections: Sequence[Array] | None
    noise: Array | None


@dataclass(frozen=True, eq=False)
class CLDPlan:
    """The steps of a run, 2 x 2 matrices over (x, v) throughout."""

    process: CLD
    steps: tuple[CLDStep, ...]

    @property
    def nfe(self) -> int:
        """Network evaluations of a run."""
        return len(self.steps)

    @property
    def evaluations(self) -> tuple[Level, ...]:
        """The level (of x) of every network evaluation, in order."""
        return tuple(step.start for step in self.steps)

    def run(
        self,
        network: Callable[..., Tensor],
        u: Tensor,
        *,
        noise: Any = 0,
        cond: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """From u, (batch, 2, ...), to u at the end, in float32 or float64 if u is.

        network: network(u, t, **cond), t (batch,), returns a tensor of u's shape.
        noise: as in `Plan.start`; a draw has the shape of u.
        """
        if not isinstance(u, Tensor) or u.ndim < 2 or u.shape[1] != 2 or not u.is_floating_point():
            what = f"{tuple(u.shape)}, {u.dtype}" if isinstance(u, Tensor) else type(u).__name__
            raise ValueError(f"u is {what}; need a floating-point tensor (batch, 2, ...)")
        if not callable(network):
            raise ValueError(f"network = {network!r} is not callable; give network(u, t)")
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        watch = _Watch(self)  # pyright: ignore[reportArgumentType]
        source, outputs = as_source(noise), list[Tensor]()
        if not bool(torch.isfinite(u).all()):
            raise ValueError("u contains NaN or inf; start from finite values")
        before, base = None, u
        for i, step in enumerate(self.steps):
            with torch.no_grad():
                out = network(u, u.new_full((len(u),), step.start.t), **(cond or {}))
                check_output(out, u)
                state: Any = SimpleNamespace(nfe=i + 1, done=i + 1 == self.nfe)
                watch.look(out, state)
                outputs = [out, *outputs[:3]]
                if before is not None and before.corrections is not None:
                    u = _mixed(
                        [(before.psi, base), *zip(before.corrections, outputs, strict=False)]
                    )
                base, before = u, step
                terms = [(step.psi, base), *zip(step.weights, outputs, strict=False)]
                if step.noise is not None:
                    draw = Draw(step.start, step.end)
                    terms.append((step.noise, source.draw(draw, i, u)))
                u = _mixed(terms)
        return u


def _mixed(terms: Sequence[tuple[Array, Tensor]]) -> Tensor:
    """sum c v, with matrices c over axis 1 of the v, in the dtype of the first."""
    parts = [
        combine([(float(c[i, j]), v[:, j]) for c, v in terms for j in (0, 1)], terms[0][1].dtype)
        for i in (0, 1)
    ]
    return torch.stack(parts, 1)


def sample_cld(
    network: Callable[..., Tensor],
    shape: Sequence[int],
    plan: CLDPlan,
    *,
    seed: int | Sequence[int] = 0,
    first: int = 0,
    noise: Any = None,
    cond: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw samples x of the given shape, (batch, ...), from the prior N(0, diag(1, M)).

    network: as in `CLDPlan.run`, which starts from any u and returns v too. plan: from `CLD.plan`.
    seed, first, noise, cond, device, dtype: as in `sample`.
    """
    if not isinstance(plan, CLDPlan):
        raise ValueError(f"plan = {plan!r}; make one with fewstep.CLD().plan(nfe)")
    shape = tuple(shape)
    if not shape or not all(isinstance(n, Integral) and n > 0 for n in shape):
        raise ValueError(f"shape = {shape}; need positive integers, batch first")
    device = device_of(network) if device is None else device
    z = start_noise((shape[0], 2, *shape[1:]), seed, first=first, dtype=dtype, device=device)
    u = _mixed([(plan.process._units, z)])
    noise = Noise(seed, first) if noise is None else noise
    return plan.run(network, u, noise=noise, cond=cond)[:, 0]
