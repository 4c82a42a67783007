"""What a diffusers scheduler config says: the process, the prediction, the spacing.

Three families cover the schedulers of continuous diffusion and flow models:

    table   beta_schedule ...            DiscreteVP, x = alpha x0 + sigma eps, told the index
    flow    FlowMatch*, flow sigmas      Flow, x = (1 - t) x0 + t eps, told num_train_timesteps t
    edm     EDM*, CosineDPM*, continuous EDM, x = x0 + sigma eps, told a function of sigma

They are told apart by their entries: the config of a scheduler that was not loaded from a file does
not name its class. A table keeps x variance preserving whatever the class in the config did (Euler
and its kin hold x / alpha); the pipeline cannot tell, for it asks the scheduler for every scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .._grids import Grid, as_grid, beta, karras
from .._hooks import clip, dynamic_threshold
from .._plan import Hook
from .._prediction import Prediction, as_prediction, edm, unknown
from .._process import EDM, Array, DiscreteVP, Flow, Level, Process

__all__ = ["Described", "described", "spacing"]

_PREDICTIONS = {
    "epsilon": "noise",
    "sample": "data",
    "v_prediction": "v",
    "flow_prediction": "flow",
}


@dataclass(frozen=True)
class Described:
    """A scheduler config in our terms.

    time_of: from what the network is told to the time of the process.
    final: "zero" or "min", where the config ends a run. hook: its clipping of the data prediction.
    learned: whether outputs carry a learned variance in their second half, which is dropped.
    """

    process: Process
    prediction: Prediction
    time_of: Callable[[float], float]
    final: str
    hook: Hook | None
    learned: bool


def described(config: Mapping[str, Any], mu: float | None = None) -> Described:
    """Process and prediction of a scheduler config. mu: dynamic shift, where it asks for one."""
    name = str(config.get("source") or "")
    if "Inverse" in name:
        raise ValueError(f"config is of {name}; give that of the sampling scheduler")
    kind = config.get("prediction_type", "epsilon")
    if kind not in _PREDICTIONS:
        raise ValueError(unknown("prediction_type", str(kind), _PREDICTIONS))
    predicts = _PREDICTIONS[kind]
    table, edm_like = "beta_schedule" in config, "sigma_data" in config
    if config.get("use_flow_sigmas") or ("shift" in config and not (table or edm_like)):
        predicts = predicts if "prediction_type" in config else "flow"
        process: Process = Flow(shift=_shift(config, mu))
        scale = float(config.get("num_train_timesteps", 1000))
        prediction, time_of = as_prediction(predicts, scale), lambda t: t / scale
    elif mu is not None:
        raise ValueError(f"mu = {mu}, but this config is of no flow, which has a shift")
    elif edm_like or config.get("timestep_type") == "continuous":
        process, prediction, time_of = _edm(config, predicts)
    elif table and predicts != "flow":
        process, time_of = _table(config), lambda t: t
        prediction = as_prediction(predicts)
    else:
        raise ValueError(
            f"config {name or sorted(config)} is none that fewstep knows; accepted: those with a "
            "beta_schedule, of flow matching, of EDM"
        )
    last = config.get("final_sigmas_type", "zero")
    ends_early = last == "sigma_min" or not config.get("set_alpha_to_one", True)
    return Described(
        process,
        prediction,
        time_of,
        "min" if ends_early and not isinstance(process, Flow) else "zero",
        _hook(config),
        str(config.get("variance_type", "")).startswith("learned"),
    )


def _shift(config: Mapping[str, Any], mu: float | None) -> float:
    if config.get("invert_sigmas"):
        raise ValueError("config: invert_sigmas = True, a path told backward, is not supported")
    if config.get("use_dynamic_shifting"):
        if mu is None:
            raise ValueError(
                "mu is missing; use_dynamic_shifting = True asks for it, from the resolution"
            )
        return float(mu) if config.get("time_shift_type") == "linear" else math.exp(mu)
    if mu is not None:
        raise ValueError(f"mu = {mu}, but use_dynamic_shifting is not set in the config")
    return float(config.get("flow_shift", config.get("shift", 1.0)))


def _edm(
    config: Mapping[str, Any], predicts: str
) -> tuple[EDM, Prediction, Callable[[float], float]]:
    if predicts not in ("noise", "v"):
        raise ValueError(f"prediction_type = {config['prediction_type']!r} of an EDM scheduler")
    if "sigma_data" in config:
        ends = config["sigma_min"], config["sigma_max"]
        data = float(config["sigma_data"])
    else:
        table = _table(config)
        ends = (
            config.get("sigma_min") or math.exp(-float(table.lam(0))),
            config.get("sigma_max") or math.exp(-float(table.lam(table.t_start))),
        )
        data = 1.0
    process = EDM(*(float(s) for s in ends))
    # CosineDPMSolverMultistep, the only multistep one of them without a choice of algorithm.
    if "solver_order" in config and "algorithm_type" not in config and "sigma_data" in config:
        told = lambda level: math.atan(level.sigma) / math.pi * 2  # noqa: E731
        prediction, time_of = edm(data, told), lambda t: math.tan(t * math.pi / 2)
    else:
        prediction, time_of = edm(data), lambda t: math.exp(4 * t)
    return process, _negated(prediction) if predicts == "v" else prediction, time_of


def _negated(base: Prediction) -> Prediction:
    """The same convention with the sign of the output turned: v is -F."""

    def to_data(level: Level) -> tuple[Any, Any]:
        p, q = base.to_data(level)
        return p, -q

    def from_data(level: Level) -> tuple[Any, Any]:
        u, w = base.from_data(level)
        return -u, -w

    return replace(base, name="edm v", to_data=to_data, from_data=from_data)


def _table(config: Mapping[str, Any]) -> DiscreteVP:
    n = int(config.get("num_train_timesteps", 1000))
    kind, betas = config["beta_schedule"], config.get("trained_betas")
    first, last = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    if betas is not None:
        table = DiscreteVP.from_betas(np.asarray(betas, dtype=np.float64), "trained_betas")
    elif kind == "linear":
        table = DiscreteVP.linear(n, first, last)
    elif kind == "scaled_linear":
        table = DiscreteVP.scaled_linear(n, first, last)
    elif kind == "squaredcos_cap_v2":
        table = DiscreteVP.squared_cosine(n)
    elif kind == "sigmoid":
        logistic = 1 / (1 + np.exp(-np.linspace(-6, 6, n)))
        table = DiscreteVP.from_betas(first + (last - first) * logistic, "sigmoid")
    elif kind == "laplace":
        u = np.arange(n + 1) / n
        lam = -0.5 * np.copysign(1.0, 0.5 - u) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6)
        signal = np.sqrt(1 / (1 + np.exp(-lam)))
        betas = np.minimum(1 - signal[1:] / signal[:-1], 0.999)
        table = DiscreteVP.from_betas(betas, "laplace")
    else:
        known = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
        raise ValueError(unknown("beta_schedule", str(kind), known))
    return table.zero_terminal_snr() if config.get("rescale_betas_zero_snr") else table


def _hook(config: Mapping[str, Any]) -> Hook | None:
    limit = float(config.get("sample_max_value") or 1.0)
    if config.get("thresholding"):
        return dynamic_threshold(config.get("dynamic_thresholding_ratio", 0.995), 1.0, limit)
    if config.get("clip_sample"):
        limit = float(config.get("clip_sample_range") or 1.0)
        return clip(-limit, limit)
    return None


def spacing(config: Mapping[str, Any], process: Process, clock: bool = False) -> Grid:
    """The spacing that a config asks for, as a grid. clock: the shift of a flow acts on 1 - i / n,
    which pipelines give, and not on what the scheduler's class has for those that give nothing."""
    if isinstance(process, Flow):
        return Grid("config", lambda p, steps, final: _flow_times(config, process, steps, clock))
    low, high = config.get("sigma_min") or 0.0, config.get("sigma_max") or math.inf
    if config.get("use_karras_sigmas") or config.get("sigma_schedule") == "karras":
        return replace(karras(config.get("rho", 7.0), low=low, high=high), name="config")
    if (
        config.get("use_exponential_sigmas")
        or config.get("use_lu_lambdas")
        or not isinstance(process, DiscreteVP)
    ):
        return replace(as_grid("lambda"), name="config")
    if config.get("use_beta_sigmas"):
        # Quantiles in t, as in the paper; diffusers takes them in sigma (one giant last step).
        return replace(beta(), name="config")
    kind = config.get("timestep_spacing", "leading")
    if kind not in ("linspace", "leading", "trailing"):
        raise ValueError(
            unknown("timestep_spacing", str(kind), ("linspace", "leading", "trailing"))
        )
    return Grid("config", lambda p, steps, final: _table_times(config, kind, p, steps, final))


def _table_times(
    config: Mapping[str, Any], kind: str, process: Process, steps: int, final: str
) -> Array:
    n = round(process.t_start) + 1
    # Multistep classes space N steps as N of N + 1 times, and drop the last.
    more = steps + ("solver_order" in config or "predictor_order" in config)
    if kind == "linspace":
        t = np.linspace(0, n - 1, more).round()[::-1] if more > 1 else np.array([n - 1.0])
    elif kind == "leading":
        if steps == 1:
            raise ValueError(
                "timestep_spacing = 'leading' with one step starts at a time where there is almost "
                "no noise; use 'trailing', or more steps"
            )
        t = (np.arange(more) * (n // more))[::-1] + float(config.get("steps_offset", 0))
    else:
        t = np.round(n - np.arange(steps) * (n / steps)) - 1
    t = t[:steps]
    # A run that would end where its last evaluation is goes on to sigma = 0.
    end = process.t_end if final == "min" and t[-1] > process.t_end else process.t_clean
    return np.append(t, math.nan if end is None else end)


def _flow_times(config: Mapping[str, Any], process: Flow, steps: int, clock: bool) -> Array:
    last = 1 / float(config.get("num_train_timesteps", 1000))
    if clock:
        u = 1 - np.arange(steps) / steps
    elif "solver_order" in config or "predictor_order" in config:  # N of N + 1, as in a table
        u = np.linspace(1.0, last, steps + 1)[:-1]
        u = u if "predict_x0" in config else u - last  # all but UniPC begin one index below 1
    else:
        u = np.linspace(1.0, last, steps)
    t = process.warp(u)
    if config.get("shift_terminal") and t[-1] < 1:  # one step has nothing to stretch
        t = 1 - (1 - t) * (1 - config["shift_terminal"]) / (1 - t[-1])
    ramp, ends = np.linspace(0, 1, steps), (t[0], t[-1])
    if config.get("use_karras_sigmas"):
        t = (ends[0] ** (1 / 7) + ramp * (ends[1] ** (1 / 7) - ends[0] ** (1 / 7))) ** 7
    elif config.get("use_exponential_sigmas"):
        t = np.exp(np.log(ends[0]) + ramp * np.log(ends[1] / ends[0]))
    elif config.get("use_beta_sigmas"):
        quantiles = beta().place(Flow(t_start=ends[0], t_end=ends[1]), max(steps - 1, 1), "min")
        t = quantiles if steps > 1 else t
    return np.append(t, 0.0)
