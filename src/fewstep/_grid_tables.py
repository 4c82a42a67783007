"""Published node lists: noise levels and times that a paper or a distilled model prescribes.

`AYS` are tables of rho = sigma / alpha; they become grids of any number of steps in `_grids`.
`node_lists` are lists of times for a fixed number of steps, with the process they were published
for. A distilled model answers well at its own times only; where the entry says so it is also meant
to be sampled by its own rule (jump to the data prediction, then add noise again), not by a solver.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._process import EDM, DiscreteVP, Flow, Process

__all__ = ["AYS", "NodeList", "node_lists"]

# Align Your Steps (arXiv 2404.14507): 10 steps, rho = sigma / alpha. The first two to more digits
# than the paper has, as on the authors' how-to page (and in ComfyUI).
AYS: dict[str, tuple[float, ...]] = {
    "ays_sd15": (
        *(14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092),
        *(0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582),
    ),
    "ays_sdxl": (
        *(14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141),
        *(0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582),
    ),
    "ays_if": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
    "ays_svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


@dataclass(frozen=True)
class NodeList:
    """Times that exist for certain numbers of steps only.

    nodes: number of steps -> times on `process`, noise first; with `to_clean` they are the times of
        the evaluations, and the clean end of the process follows; else the last is where it stops.
    process: what the times refer to. source: where the numbers come from.
    """

    name: str
    process: Process
    nodes: Mapping[int, Sequence[float]]
    source: str
    to_clean: bool = True

    def times(self, on: Any = None, nfe: int | None = None) -> list[float]:
        """The list, to be given as `grid=`.

        on: the process, or model, to give times for: the same noise levels, rounded where the
            process has integer times. Default: `process`, the times as published.
        nfe: the number of steps; may be left out where there is one list only.
        """
        counts = ", ".join(map(str, self.nodes))
        if nfe is None and len(self.nodes) == 1:
            (nfe,) = self.nodes
        if nfe is None or nfe not in self.nodes:
            raise ValueError(f"nfe = {nfe}; node list {self.name!r} exists for {counts} steps")
        process = self.process if on is None else getattr(on, "process", on)
        if not isinstance(process, Process):
            raise ValueError(f"on = {on!r}; give a process or a model, for example fewstep.VP()")
        t = np.array(self.nodes[nfe], dtype=np.float64)
        if process != self.process:
            t = self._moved(process, t)
        rounds = getattr(on, "rounds", process.integer_times)
        if rounds and on is not None:
            t = np.round(t)
        if not self.to_clean:
            return t.tolist()
        if process.t_clean is None:
            raise ValueError(
                f"node list {self.name!r} ends at sigma = 0, but {process!r} has no t_clean"
            )
        return [*t.tolist(), process.t_clean]

    def _moved(self, process: Process, t: Any) -> Any:
        """The times of the same noise levels on another process."""
        lam = self.process.lam(t)
        start, end = float(process.lam(process.t_start)), float(process.lam(process.t_end))
        if lam[0] < start - 1e-9 or lam[-1] > end + 1e-9:
            low, high, least, most = (math.exp(-v) for v in (lam[-1], lam[0], end, start))
            raise ValueError(
                f"node list {self.name!r} has sigma / alpha from {low:.4g} to {high:.4g}, "
                f"{process!r} only from {least:.4g} to {most:.4g}"
            )
        moved = process.time(lam)
        moved[lam <= start + 1e-9] = process.t_start
        return moved


_SD = DiscreteVP.scaled_linear()


def _trailing(*steps: int) -> dict[int, list[float]]:
    """Integer times 999, ... of the "trailing" spacing (arXiv 2305.08891)."""
    return {n: (np.round(1000 - np.arange(n) * (1000 / n)) - 1).tolist() for n in steps}


def _lcm(*steps: int) -> dict[int, list[float]]:
    """Every (50 / n)-th of the 50 training times 999, 979, ..., 19, rounded down."""
    times = np.arange(999.0, 0.0, -20.0)
    return {n: times[np.floor(np.arange(n) * (50 / n)).astype(int)].tolist() for n in steps}


_RULE = "; its own rule: x = alpha D + sigma z with fresh noise z after each step"
_LESS = "Hyperparameters are all you need, 2510.02390, official code"

node_lists: dict[str, NodeList] = {
    entry.name: entry
    for entry in (
        NodeList(
            "lcm",
            _SD,
            _lcm(*range(1, 9)),
            "Latent Consistency Models, 2310.04378: diffusers LCMScheduler, 50 original steps"
            + _RULE,
        ),
        NodeList(
            "sdxl_turbo",
            _SD,
            _trailing(1, 2, 3, 4),
            "Adversarial Diffusion Distillation, 2311.17042: scheduler of stabilityai/sdxl-turbo, "
            "trailing; its own rule is Euler ancestral",
        ),
        NodeList(
            "sdxl_lightning",
            _SD,
            _trailing(1, 2, 4, 8),
            "SDXL-Lightning, 2402.13929: model card of ByteDance/SDXL-Lightning, Euler, trailing; "
            "one checkpoint per number of steps, that of 1 step predicts data",
        ),
        NodeList(
            "hyper_sd",
            _SD,
            {1: [800.0], **_trailing(2, 4, 8)},
            "Hyper-SD, 2404.13686: model card of ByteDance/Hyper-SD, DDIM, trailing; one "
            "checkpoint per number of steps, 800 for the 1-step network of SDXL",
        ),
        NodeList(
            "dmd2_sdxl",
            _SD,
            {1: [399.0], 4: [999.0, 749.0, 499.0, 249.0]},
            "DMD2, 2405.14867: README of tianweiy/DMD2; one checkpoint per number of steps" + _RULE,
        ),
        NodeList(
            "flux_schnell",
            Flow(),
            {n: (1 - np.arange(n) / n).tolist() for n in (1, 2, 3, 4)},
            "FLUX.1-schnell: official code, uniform in t without shift, Euler",
        ),
        NodeList(
            "flux2_dev_turbo",
            Flow(t_end=0.0003),
            {8: [1.0, 0.6509, 0.4374, 0.2932, 0.1893, 0.1108, 0.0495, 0.00031]},
            "FLUX.2-dev Turbo: model card of fal/FLUX.2-dev-Turbo, Euler",
        ),
        NodeList(
            "cd_imagenet64",
            EDM(),
            {2: (np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), 40)[[0, 22]] ** 7).tolist()},
            "Consistency Models, 2303.01469: official launch script, levels 0, 22 of 40; its own "
            "rule: x = D + sqrt(sigma^2 - 0.002^2) z with fresh noise z after each step",
        ),
        NodeList(
            "sd_5_6_8",
            _SD,
            {
                5: [999.0, 772.5, 556.7, 354.2, 170.0, 18.3],
                6: [999.0, 809.6, 627.3, 453.5, 290.4, 141.7, 18.3],
                8: [999.0, 857.3, 719.4, 585.9, 457.2, 334.3, 218.7, 112.7, 22.7],
            },
            f"{_LESS} for Stable Diffusion 1.5; 5 and 6 steps with ddim, 8 with dpmpp_2m; stops at "
            "sigma > 0, the latent is decoded with the noise left in it",
            to_clean=False,
        ),
        NodeList(
            "sdxl_8",
            _SD,
            {8: [999.0, 852.3, 709.7, 571.8, 439.2, 313.0, 194.9, 88.2, 3.2]},
            f"{_LESS} for SDXL, with dpmpp_2m; stops at sigma > 0",
            to_clean=False,
        ),
    )
}
