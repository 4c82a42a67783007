"""Comparisons as a run of `fewstep.compare` makes them, of invented numbers."""

from __future__ import annotations

import math

import numpy as np

from fewstep._compare._numbers import Comparison, Line
from fewstep.metrics import Estimate

NFES = (3, 4, 5, 6, 8, 10, 15, 20)
AWKWARD = 'a<b>&"c"</script><script>alert(1)</script>'
SOLVERS = (
    ("ddim", 1.0, 1.0),
    ("heun", 2.0, 2.0),
    ("dpmpp_2m", 0.9, 1.9),
    ("dpmpp_3m", 1.1, 2.6),
    ("unipc_2", 0.8, 2.0),
    ("unipc_3", 0.7, 2.8),
    ("ipndm_2", 0.95, 1.8),
    ("ipndm_3", 0.85, 2.4),
    ("ipndm_4", 0.9, 2.7),
    ("deis_tab3", 0.82, 2.5),
    ("dpm_solver_2s", 1.6, 2.0),
    (AWKWARD, 1.2, 2.2),
    ("__proto__", 1.3, 1.5),
    ("$learned_{plan}$", 0.25, 2.6),
)


def estimate(value: float, relative: float = 0.06) -> Estimate:
    return Estimate(value, value * (1 - relative), value * (1 + relative))


def comparison(
    model: str = "digits",
    *,
    seed: int = 0,
    methods: int = 14,
    frechet: bool = True,
    pictures: tuple[int, ...] = (4, 8, 8, 1),
    diverges: bool = True,
) -> Comparison:
    """Errors c (3 / nfe)^order with chance on them. heun skips odd numbers of evaluations, the
    awkward name diverges at the fewest."""
    rng = np.random.default_rng(seed)
    solvers = [*SOLVERS[:methods]]
    while len(solvers) < methods:
        k = len(solvers)
        solvers.append((f"variant_{k}", 0.7 + 0.02 * k, 1.2 + (k * 7 % 15) / 10))
    floor = Estimate(0.004, 0.002, 0.006)
    found: dict[int, list[Line]] = {}
    skipped: dict[tuple[str, int], str] = {}
    images: dict[tuple[str, int], np.ndarray] = {}
    clean = rng.random(pictures) if pictures else np.zeros(())
    if pictures:
        images["converged", 0] = _pixels(clean)
    for nfe in NFES:
        rows = []
        for name, scale, order in solvers:
            if name == "heun" and nfe % 2:
                skipped[name, nfe] = f"nfe = {nfe}: heun takes two evaluations per step"
                continue
            median = 0.3 * scale * (3 / nfe) ** order * math.exp(0.15 * rng.standard_normal())
            infinite = diverges and name == AWKWARD and nfe == 3
            rows.append((name, math.inf if infinite else median, order))
            if pictures:
                noise = rng.standard_normal(pictures)
                images[name, nfe] = _pixels(clean + median * noise)
        best = min(v for _, v, _ in rows)
        found[nfe] = [
            Line(
                method=name,
                kind="recipe" if name.startswith("$") else "solver",
                grid="learned" if name.startswith("$") else ("softened", "karras")[nfe % 2],
                final="zero" if order > 2 else "min",
                nfe=nfe,
                median=estimate(v),
                rms=estimate(1.6 * v, 0.2),
                p90=estimate(2.4 * v, 0.1),
                ratio=estimate(v / best, 0.05 if v > best else 0),
                best=v == best,
                tied=v == best or v / best < 1.05,
                sliced=_distance(v, floor, rng),
                frechet=_distance(10 * v * v, floor, rng) if frechet else None,
                data=_distance(10 * v * v + 0.05, floor, rng) if frechet else None,
            )
            for name, v, order in rows
        ]
    return Comparison(
        model=model,
        lines=tuple(v for nfe in NFES for v in found[nfe]),
        converged={
            "sliced": floor,
            "frechet": floor if frechet else None,
            "data": estimate(0.055) if frechet else None,
        },
        skipped=skipped,
        about={
            "count": 256,
            "seed": seed,
            "grids": ["softened", "karras", "ays_if"],
            "versions": {"fewstep": "0.1", "torch": "2.13.0"},
            "evaluations of one sample": 1234567,
            "note": AWKWARD,
        },
        pictures=images,
    )


def _distance(v: float, floor: Estimate, rng: np.random.Generator) -> Estimate:
    """With the floor's noise: it may come out below 0."""
    if not math.isfinite(v):
        return Estimate(v, v, v)
    value = v + 0.003 * rng.standard_normal()
    return Estimate(value, value - 0.003 - 0.1 * v, value + 0.003 + 0.1 * v)


def _pixels(x: np.ndarray) -> np.ndarray:
    return np.nan_to_num(255 * x, posinf=255, neginf=0).clip(0, 255).astype(np.uint8)
