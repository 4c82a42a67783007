r"""Estimating the statistics of DPM-Solver-v3 on the model in hand.

With y = x / alpha and rho = sigma / alpha, let G = rho e = y - D be what the network adds, so that
dy/dlambda = -G. Then N / alpha = f = G - l y, and with ' the total derivative along the ODE

    l  = E[ diag dG/dy ],      f' = G' - l' y + l G.

A network says out, and G = g_x x + g_o out with g_x = 1 / alpha - p, g_o = -q: its four scalars and
their derivatives in lambda are all that a process and a prediction are here. Per level two passes
over the samples x = alpha x_0 + sigma n, with the same x_0, n and probes at every level:

    1. diag d out / d x_in from directions v of random signs, E[v (J v)] (one JVP per probe),
    2. out, and out' by a JVP in the direction (x_in', c_noise') that out itself decides; the means
       and centred second moments of f and f'.

The network's answers are combined in float64, with scalars of the host that were combined before:
near the noise l -> 1, near the data l -> 0, and neither f nor l is a difference of what cancels,
unless the network's convention makes it one.

Sources: arXiv 2310.13268, section 3.2 and appendix C (estimation); Chan, Golub, LeVeque, "Updating
formulae and a pairwise algorithm for computing sample variances", 1979 (second moments).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm import tqdm

from .._denoiser import Denoiser, Guided, Model, Wrapper, check_output, told_integers
from .._files import _parsed, _tensors, read, to_bytes, write
from .._noise import Draw, Noise
from .._prediction import unknown
from .._process import Array, Level, Process
from .._sampling import sample
from ._ems import EMS, lam_grid, shared
from ._fingerprint import network_of
from ._teacher import taken

__all__ = ["digest", "estimate_ems"]

_FORMAT = "fewstep.ems.part.1"
#: The noise of the states has this bit of its seed turned: samples that a user drew with the same
#: seed, or that are drawn here, must not come from the noise that is added to them.
_OWN = 1 << 63
#: Deviations of f below this many times those that rounding makes are taken for rounding.
_ROUNDING = 30
_FINEST = float(np.finfo(np.float64).eps)
#: Elements that are combined in float64 at a time.
_SLICE = 1 << 16
#: Half-width in lambda and nodes of the polynomial that differentiates host scalars.
_REACH, _NODES = 0.1, 10


def estimate_ems(
    model: Model,
    data: Tensor | Callable[[int, int], Tensor] | None = None,
    *,
    shape: Sequence[int] | None = None,
    count: int | None = None,
    levels: int = 120,
    lam: tuple[float, float] | ArrayLike | None = None,
    probes: int | str = 1,
    reduction: str = "element",
    derivative: str = "forward",
    smoothing: int = 0,
    cond: Mapping[str, Any] | None = None,
    seed: int = 0,
    batch: int = 64,
    generate: Mapping[str, Any] | None = None,
    path: str | os.PathLike[str] | None = None,
    group: Any = None,
    progress: bool = True,
) -> EMS:
    """The statistics l, s, b of a model, for `dpm_solver_v3`.

    model: a `Denoiser`, `Guided`, or any other: any prediction, process and number of axes. The
        statistics belong to its guidance, its conditions and its network.
    data: clean samples (K, *sample); or a function (first, count) -> tensor, called for every
        batch at every level, so that memory does not depend on the number of samples; or None:
        drawn from the model, once, and kept in a file next to `path` (or a temporary one).
    shape, generate: where data is None: of one sample, and options of `fewstep.sample` (default
        nfe=50).
    count: number of samples, at least 2; default all. Needed unless data is a tensor.
    levels: number of levels. lam: their ends (equally spaced between), or the levels themselves;
        default: the range of the process. Networks that know integer times only are asked at the
        nearest ones, each once, which may be fewer.
    probes: directions of random signs per sample, or "exact": every coordinate, one JVP each.
    reduction: what shares a coefficient: nothing ("element"), all positions of a channel
        ("channel"), everything ("scalar"). The shared s and b are fitted to all of them at once.
    derivative: "forward" (torch.func.jvp), or "difference": central differences, for networks
        without forward mode, and always for those told integers, along the line from x in the
        direction of the ODE, between integers. Differences have the accuracy eps^(2/3).
    smoothing: l' is averaged over so many levels on either side (the authors' script: 5). Not
        needed: with the same noise and probes at all levels, l is smooth in lambda.
    cond: keyword arguments for the network; what has a leading axis of the number of samples is
        per sample.
    seed: of noise and probes, for each sample its own; nothing else is random.
    batch: samples per network call.
    path: partial sums are kept in this file; interrupted at any moment and called again with the
        same arguments, the result has the same bits. A file of another job is refused.
    group: process group of torch.distributed, if it is initialised: levels are dealt to processes,
        and the result has the same bits for any number of them. Each writes `path` with its rank
        appended (the first one `path` itself); a run may go on with another number of processes.
    progress: a bar, shown only once the run has taken a second.

    s = l - 1 where f varies no more than rounding or the error of l' in f' do: there f is constant,
    as for Gaussian data, and s is 0 / 0 (`info` counts these; many of them, or few levels: take
    more). Cost per sample and level: one evaluation and probes + 1 JVPs, of about two evaluations
    each; or with differences 3 + 2 probes evaluations. An evaluation that a JVP contains is not
    counted again.
    """
    job = _job(model, data, shape, count, levels, lam, probes, reduction, derivative, smoothing)
    ranks = _Ranks(group)
    for name, value, least in (("batch", batch, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} = {value!r}; need an integer >= {least}")
    if cond is not None and not isinstance(cond, Mapping):
        raise ValueError(f"cond = {cond!r}; need a mapping of the network's keyword arguments")
    if generate and data is not None:
        raise ValueError("generate has no meaning where data are given; leave it out")
    Noise(seed)  # refuses what is no seed
    total = len(data) if isinstance(data, Tensor) else job.count
    conditions = taken(cond or {}, slice(0, job.count), total)
    source: Any = data
    if data is None:
        source = _Generated(model, job, conditions, dict(generate or {}), int(seed), int(batch))
    work = _Work(model, job, source, conditions, int(seed) ^ _OWN, int(batch))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        store = _Store(None if path is None else Path(path), ranks.rank, work, int(seed))
        if isinstance(source, _Generated):
            source.prepare(store.beside(Path(folder)), ranks)
        store.same_answers(work.check())
        return _run(work, store, ranks, progress)


def _run(work: _Work, store: _Store, ranks: _Ranks, progress: bool) -> EMS:
    job, n = work.job, len(work.job.lam)
    mine = range(ranks.rank, n, ranks.world)
    begun = time.monotonic() - store.seconds
    l = store.tables[0]
    with tqdm(
        total=2 * len(mine) * work.chunks,
        unit="batch",
        delay=1.0,
        leave=False,
        disable=not progress,
    ) as bar:
        for stage, table in enumerate(store.tables):
            for j in mine:
                done, sums = store.get(stage, j)
                bar.update(done)
                while done < work.chunks:
                    sums = work.add(stage, j, done, sums, l)
                    done += 1
                    row = work.finished(stage, j, sums, l) if done == work.chunks else None
                    store.put(stage, j, done, sums, row, time.monotonic() - begun)
                    bar.update()
            ranks.join(table, mine)
    seconds = ranks.summed(time.monotonic() - begun)
    store.finish(time.monotonic() - begun, ranks)
    s, b = store.tables[1][:, 0], store.tables[1][:, 1]
    for array in (l, s, b):
        array.flags.writeable = False
    info = {
        **{k: v for k, v in store.about.items() if k not in ("version", "levels")},
        "levels": str(n),
        "lambda": f"{job.lam[0]:.6g} to {job.lam[-1]:.6g}",
        "coefficients with s = l - 1": f"{int((s == l - 1).sum())} of {s.size}",
        **work.spent(),
        "seconds": f"{seconds:.1f}",
    }
    return EMS(job.lam, l, s, b, info)


def _slope(l: Array, lam: Array, j: int, smoothing: int) -> tuple[Array, Array]:
    """dl/dlambda at a level, averaged over neighbours, and about how far it may be off.

    Of the polynomial through five levels. That through three, which the method's authors use, is
    not good enough where data look Gaussian: f' there is a small rest of l' y, and s is off by
    hundreds with 97 levels, at the noisy end of the table.
    """
    n = len(lam)

    def slope(k: int, points: int) -> Any:
        m = min(points, n)
        a = min(max(0, k - m // 2), n - m)
        u = lam[a : a + m] - lam[k]
        weights = np.linalg.solve(u[None, :] ** np.arange(m)[:, None], np.eye(m)[1])
        return np.tensordot(weights, l[a : a + m], 1)

    around = range(max(0, j - smoothing), min(n, j + smoothing + 1))
    mean = np.mean([slope(k, 5) for k in around], axis=0)
    return mean, np.abs(slope(j, 5) - slope(j, 3))


# What is to be done ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """Arguments that were checked, and the levels with their scalars."""

    count: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    lam: Array
    levels: tuple[Level, ...]
    #: (n, 5): g_x, g_o, c_in, c_noise, log alpha; and their derivatives in lambda
    scalars: Array
    slopes: Array
    probes: int | None
    reduction: str
    forward: bool
    smoothing: int


def _job(
    model: Any,
    data: Any,
    shape: Sequence[int] | None,
    count: Any,
    levels: Any,
    lam: Any,
    probes: Any,
    reduction: str,
    derivative: str,
    smoothing: Any,
) -> _Job:
    if not isinstance(model, Model):
        raise ValueError(
            f"model = {model!r}; wrap your network: fewstep.Denoiser(network, process=..., "
            "predicts=...)"
        )
    for part in _chain(model):
        if isinstance(part, Guided) and isinstance(part.scale, tuple):
            raise ValueError(
                f"model: guidance has {len(part.scale)} scales, one per sample; statistics belong "
                "to one scale: give a number"
            )
    if derivative not in ("forward", "difference"):
        raise ValueError(unknown("derivative", str(derivative), ("forward", "difference")))
    whole = told_integers(model.rounds, model.prediction)
    if model.rounds and derivative == "forward":
        raise ValueError(
            "derivative = 'forward', but the network knows integer times only and has no "
            "derivative in time; use derivative = 'difference', which differs between integers"
        )
    for name, value, least in (
        ("count", 2 if count is None else count, 2),
        ("smoothing", smoothing, 0),
        ("probes", 1 if probes == "exact" else probes, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            exact = ', or "exact"' if name == "probes" else ""
            raise ValueError(f"{name} = {value!r}; need an integer >= {least}{exact}")
    dtype = torch.float32
    if isinstance(data, Tensor):
        _check_data(data, tuple(data.shape[1:]))
        if shape is not None and tuple(shape) != tuple(data.shape[1:]):
            raise ValueError(f"shape = {tuple(shape)}, but data has {tuple(data.shape[1:])}")
        if len(data) < (2 if count is None else count):
            raise ValueError(f"data has {len(data)} samples; need count = {count or 2} or more")
        count = len(data) if count is None else count
        shape, dtype = data.shape[1:], data.dtype
    elif data is None or callable(data):
        if count is None:
            raise ValueError("count is missing; give the number of samples, or data as a tensor")
        if data is None and shape is None:
            raise ValueError("shape is missing; give that of one sample, or data")
        if callable(data):
            first: Any = data(0, 1)
            _check_data(first, None if shape is None else tuple(shape))
            shape, dtype = first.shape[1:], first.dtype
    else:
        raise ValueError(
            f"data = {data!r}; need a tensor (count, *sample), a function (first, count) -> "
            "tensor, or None"
        )
    assert shape is not None
    one = tuple(shape)
    if not all(isinstance(n, Integral) and n > 0 for n in one):
        raise ValueError(f"shape = {one}; need positive integers, those of one sample")
    shared(reduction, len(one))
    grid = _grid(model, levels, lam)
    at = model.process.level(_times(model, grid))
    here = tuple(Level(*map(float, v)) for v in zip(at.t, at.alpha, at.sigma, grid, strict=True))
    scalars = _scalars(model, at.t)
    slopes = np.array([_derivative(model, v, whole) for v in grid])
    return _Job(
        int(count),
        tuple(map(int, one)),
        torch.promote_types(dtype, torch.float32),
        grid,
        here,
        scalars,
        slopes,
        None if probes == "exact" else int(probes),
        reduction,
        derivative == "forward",
        int(smoothing),
    )


def _check_data(data: Any, shape: tuple[int, ...] | None, count: int | None = None) -> None:
    ok = isinstance(data, Tensor) and data.ndim > 0 and data.is_floating_point()
    if not ok or (shape is not None and tuple(data.shape[1:]) != shape):
        what = f"{data.dtype} {tuple(data.shape)}" if isinstance(data, Tensor) else type(data)
        raise ValueError(f"data: {what}; need floating-point samples (count, *{shape or 'sample'})")
    if count is not None and len(data) != count:
        raise ValueError(f"data: asked for {count} samples, the function gave {len(data)}")
    if not bool(torch.isfinite(data).all()):
        raise ValueError("data holds nan or infinity; need finite samples")


def _range(process: Process) -> tuple[float, float]:
    return float(process.lam(process.t_start)), float(process.lam(process.t_end))


def _times(model: Model, lam: Array) -> Array:
    t = model.process.time(lam)
    return np.round(t) if model.rounds else t


def _grid(model: Model, levels: Any, lam: Any) -> Array:
    process = model.process
    grid = lam_grid(process, levels, lam)
    low, high = _range(process)
    if grid.ndim != 1 or len(grid) < 2 or not bool((np.diff(grid) > 0).all()):
        raise ValueError(f"lam has shape {grid.shape}; need two ends, or rising levels")
    if not (low - 1e-9 <= grid[0] and grid[-1] <= high + 1e-9):
        raise ValueError(
            f"lam = {grid[0]:.6g} to {grid[-1]:.6g}; the network knows {low:.6g} to {high:.6g}"
        )
    if model.rounds:
        grid = np.unique(process.lam(_times(model, grid)))
        grid = grid[np.isfinite(grid)]
        if len(grid) < 3:
            raise ValueError(
                f"lam, levels: {len(grid)} integer times between; need at least 3 for differences"
            )
    return grid


def _scalars(model: Model, t: Array) -> Array:
    """(n, 5): g_x, g_o, c_in, c_noise and log alpha."""
    level = model.process.level(np.asarray(t, dtype=np.float64))
    p, q, c_in, c_noise = model.prediction.scalars(level)
    parts = (1 / level.alpha - p, -q, c_in, c_noise, np.log(level.alpha))
    return np.stack([np.broadcast_to(v, level.t.shape) for v in parts], axis=-1)


def _derivative(model: Model, lam: float, whole: bool) -> Array:
    """Derivatives of `_scalars` in lambda: of the polynomial through Chebyshev points around, none
    of them beyond the range of the process or a kink of its table."""
    process = model.process
    noisy, last = _range(process)
    if process.t_clean is not None:
        last = max(last, float(process.lam(process.t_clean)))
    low, high = max(noisy, lam - _REACH), min(last, lam + _REACH)
    kinks = process.knots(low, high)
    # A level on a kink has the derivatives towards the data.
    low = max([low, *kinks[(kinks <= lam) & (kinks < high)]])
    high = min([high, *kinks[kinks > lam]])
    z = np.cos(np.pi * np.arange(_NODES) / (_NODES - 1))
    nodes = 0.5 * (low + high) + 0.5 * (high - low) * z
    weights = (-1.0) ** np.arange(_NODES)
    weights[[0, -1]] *= 0.5
    values = _scalars(model, process.time(nodes))
    if whole:
        values[:, 3] = 0.0  # told integers: no derivative, and none is used
    gap = lam - nodes
    near = int(np.abs(gap).argmin())
    if abs(gap[near]) < 1e-12 * max(1.0, abs(lam)):  # on a node
        others = np.arange(_NODES) != near
        quotient = (values[others] - values[near]) / (nodes[others] - nodes[near])[:, None]
        return -(weights[others, None] * quotient).sum(0) / weights[near]
    c = weights / gap
    at = (c[:, None] * values).sum(0) / c.sum()
    return (c[:, None] * (at - values) / gap[:, None]).sum(0) / c.sum()


def _chain(model: Model) -> list[Model]:
    out = [model]
    while isinstance(out[-1], Wrapper):
        out.append(out[-1].model)
    return out


def digest(*parts: Any) -> str:
    """Of numbers, strings, arrays, tensors and nestings of them."""
    total = hashlib.blake2b(digest_size=16)

    def take(value: Any) -> None:
        if isinstance(value, Mapping):
            for key in sorted(value, key=str):
                take(str(key))
                take(value[key])
        elif isinstance(value, (list, tuple)):
            for each in value:
                take(each)
        elif isinstance(value, Tensor):
            total.update(f"{value.dtype}{tuple(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            total.update(flat.numpy().data)
        elif isinstance(value, np.ndarray):
            total.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        else:
            total.update(repr(value).encode() + b"\0")

    take(parts)
    return total.hexdigest()


class _Generated:
    """Samples of the model, drawn once and kept in a file that is mapped into memory."""

    def __init__(
        self,
        model: Model,
        job: _Job,
        cond: Mapping[str, Any],
        options: Mapping[str, Any],
        seed: int,
        batch: int,
    ) -> None:
        self.options = {"nfe": 50, "seed": seed, "progress": False, **options}
        clash = sorted({"first", "cond", "x", "shape", "start", "upward"} & set(options))
        if clash:
            raise ValueError(f"generate names {clash[0]!r}, which is set by the other arguments")
        self.model, self.job, self.cond, self.batch = model, job, cond, batch
        self.kept: Any = None

    def prepare(self, file: Path, ranks: _Ranks) -> None:
        """Draw what the file does not hold; the processes share the work."""
        job, n = self.job, self.job.count
        if ranks.summed(float(file.exists())) < ranks.world:
            part = file.with_name(file.name + ".part")
            kept = np.lib.format.open_memmap(part, "w+", np.float32, (n, *job.shape))
            chunks = range(0, n, self.batch)
            for k, first in enumerate(chunks):
                size = min(self.batch, n - first)
                out = torch.zeros(size, *job.shape)
                if k % ranks.world == ranks.rank:
                    here = taken(self.cond, slice(first, first + size), n)
                    drawn = sample(
                        self.model, (size, *job.shape), first=first, cond=here, **self.options
                    )
                    out = drawn.to("cpu", torch.float32)
                kept[first : first + size] = ranks.total(out).numpy()
            kept.flush()
            del kept
            os.replace(part, file)
        self.kept = np.load(file, mmap_mode="r")

    def __call__(self, first: int, count: int) -> Tensor:
        return torch.from_numpy(np.array(self.kept[first : first + count]))


class _Work:
    """The network calls, and the sums that are made of them."""

    def __init__(
        self,
        model: Model,
        job: _Job,
        data: Tensor | Callable[[int, int], Tensor],
        cond: Mapping[str, Any],
        seed: int,
        batch: int,
    ) -> None:
        self.model, self.job, self.data, self.cond = model, job, data, cond
        self.seed, self.batch = seed, batch
        self.chunks = -(-job.count // batch)
        self.whole = told_integers(model.rounds, model.prediction)
        network = _chain(model)[-1]
        wanted = network.dtype if isinstance(network, Denoiser) else None
        self.rounding = max(torch.finfo(d).eps for d in (job.dtype, wanted or job.dtype))
        #: Where errors of truncation, h^2, and of rounding, eps / h, of a difference meet.
        self.step = self.rounding ** (1 / 3)
        self.accuracy = self.rounding if job.forward else self.step**2
        self.slice = max(1, _SLICE // max(1, int(np.prod(job.shape))))
        axes = shared(job.reduction, len(job.shape))
        keep = job.reduction == "channel"
        self.size = np.zeros(job.shape).mean(axes, keepdims=keep).shape if axes else job.shape
        #: Axes of a batch that are summed over.
        self.axes = (0, *(k + 1 for k in axes))

    def describe(self, seed: int) -> dict[str, str]:
        """The job, in words and digests: what has to agree to go on with it."""
        job, data = self.job, self.data
        parts = _chain(self.model)
        network = network_of(self.model)
        weights = digest(network.state_dict()) if isinstance(network, torch.nn.Module) else ""
        guidance = [
            (p.scale, p.interval, p.rescale, digest(p.uncond))
            for p in parts
            if isinstance(p, Guided)
        ]
        if isinstance(data, _Generated):
            content = digest("generated", sorted(data.options.items(), key=str))
        else:
            content = digest(data if isinstance(data, Tensor) else data(0, 1))
        step = "" if job.forward else f", step {self.step:.2g}"
        return {
            "version": _FORMAT,
            "model": " of ".join(type(p).__name__ for p in parts),
            "weights": weights,
            "guidance": repr(guidance) if guidance else "none",
            "process": repr(self.model.process),
            "predicts": self.model.prediction.name,
            "data": content,
            "cond": digest(self.cond),
            "levels": digest(job.lam, job.scalars),
            "samples": str(job.count),
            "shape": repr(job.shape),
            "dtype": str(job.dtype),
            "batch": str(self.batch),
            "probes": str(job.probes or "exact"),
            "reduction": job.reduction,
            "derivative": ("forward" if job.forward else "difference") + step,
            "smoothing": str(job.smoothing),
            "seed": str(seed),
        }

    def spent(self) -> dict[str, str]:
        """Evaluations of single samples."""
        job = self.job
        units = len(job.lam) * job.count
        directions = job.probes or int(np.prod(job.shape))
        if job.forward:
            return {"evaluations": str(units), "jvps": str(units * (directions + 1))}
        return {"evaluations": str(units * (3 + 2 * directions)), "jvps": "0"}

    # States and the network

    def _samples(self, chunk: int) -> tuple[int, Tensor]:
        first = chunk * self.batch
        count = min(self.batch, self.job.count - first)
        if isinstance(self.data, Tensor):
            return first, self.data[first : first + count]
        x = self.data(first, count)
        _check_data(x, self.job.shape, count)
        return first, x

    def _state(self, chunk: int, level: Level) -> tuple[Tensor, dict[str, Any], Noise]:
        """alpha x_0 + sigma n, the conditions, and where the probes come from."""
        first, data = self._samples(chunk)
        noise, device = Noise(self.seed, first), self.model.device
        x = noise.start(data.shape, self.job.dtype, device)
        x = self.model.process.noise_from(x, noise).mul_(level.sigma)
        x.add_(data.to(device, self.job.dtype), alpha=level.alpha)
        cond = taken(self.cond, slice(first, first + len(x)), self.job.count)
        return x, cond, noise

    def _ask(self, x_in: Tensor, c_noise: float, level: Level, cond: Mapping[str, Any]) -> Tensor:
        kind = torch.int64 if self.whole else torch.promote_types(x_in.dtype, torch.float32)
        told = round(c_noise) if self.whole else c_noise
        t_in = torch.full((len(x_in),), told, dtype=kind, device=x_in.device)
        return self._answer(x_in, t_in, level, cond)

    def _answer(self, x_in: Tensor, t_in: Tensor, level: Level, cond: Mapping[str, Any]) -> Tensor:
        out = self.model.output(x_in, t_in, level, cond)
        check_output(out, x_in)
        return out.to(x_in.dtype)  # half precision ends here

    def _jvp(
        self, j: int, x_in: Tensor, along: Tensor, rate: float, cond: Mapping[str, Any]
    ) -> Tensor:
        """Derivative of the answer at level j along (x_in, t_in) = (along, rate)."""
        level, c_noise = self.job.levels[j], float(self.job.scalars[j, 3])

        def answer(x: Tensor, t: Tensor) -> Tensor:
            return self._answer(x, t, level, cond)

        kind = torch.int64 if self.whole else torch.promote_types(x_in.dtype, torch.float32)
        t_in = torch.full((len(x_in),), c_noise, dtype=kind, device=x_in.device)
        if rate == 0.0:
            return torch.func.jvp(lambda x: answer(x, t_in), (x_in,), (along,))[1]
        return torch.func.jvp(answer, (x_in, t_in), (along, torch.full_like(t_in, rate)))[1]

    def _total(
        self, j: int, x: Tensor, out: Tensor, cond: Mapping[str, Any], forward: bool
    ) -> Tensor:
        """out' along the ODE: x' = (log alpha)' x - alpha G."""
        level, (g_x, g_o, c_in, _, _) = self.job.levels[j], self.job.scalars[j].tolist()
        _, _, dc_in, dc_noise, rate = self.job.slopes[j].tolist()
        of_x, of_out = rate - level.alpha * g_x, -level.alpha * g_o
        if forward:
            along = ((dc_in + c_in * of_x) * x).add_(out, alpha=c_in * of_out)
            return self._jvp(j, x if c_in == 1 else c_in * x, along, dc_noise, cond)
        around, weights = self._around(level)
        total = weights[0] * out
        for near, w in zip(around, weights[1:], strict=True):
            u = near.lam - level.lam
            _, _, c_in, c_noise, _ = _scalars(self.model, np.array([near.t]))[0].tolist()
            x_in = (c_in * (1 + u * of_x)) * x + (c_in * u * of_out) * out
            total = total + w * self._ask(x_in, c_noise, near, cond)
        return total

    def _around(self, level: Level) -> tuple[list[Level], list[float]]:
        """Two levels next to one, on either side where the network knows both, and the weights of
        the difference of second order: of the level itself first."""
        process, h = self.model.process, self.step
        low, high = _range(process)
        if self.model.rounds:
            ends = sorted((process.t_start, process.t_end))
            way = 1.0 if process.t_start < process.t_end else -1.0  # towards the data

            def neighbour(from_: float, side: int) -> float | None:
                t = from_
                while ends[0] <= (t := t + side * way) <= ends[1]:
                    at = float(process.lam(t))
                    if not np.isfinite(at):
                        return None
                    if abs(at - level.lam) >= h:
                        return t
                return None

            up, down = neighbour(level.t, 1), neighbour(level.t, -1)
            if up is None:
                assert down is not None
                up = neighbour(down, -1)
            elif down is None:
                down = neighbour(up, 1)
            times = [t for t in (down, up) if t is not None]
        else:
            side = 2 * h if level.lam - h < low else -2 * h if level.lam + h > high else 0.0
            offsets = (h, side) if side > 0 else (side, -h) if side < 0 else (-h, h)
            times = [float(process.time(level.lam + u)) for u in offsets]
        found = [process.level(t) for t in times]
        u = np.array([0.0, *(v.lam - level.lam for v in found)])
        # Weights w with sum w u^k = [k = 1].
        powers = u[None, :] ** np.arange(len(u))[:, None]
        weights = np.linalg.solve(powers, np.eye(len(u))[1])
        return found, weights.tolist()

    # Sums

    def _diagonal(self, j: int, chunk: int) -> Array:
        """Sum over a chunk of the mean over probes of v (J v), float64, (*size)."""
        job, level = self.job, self.job.levels[j]
        c_in, c_noise = job.scalars[j, 2:4].tolist()
        x, cond, noise = self._state(chunk, level)
        x.mul_(c_in)
        total = np.zeros(self.size)
        d = int(np.prod(job.shape))
        for k in range(d if job.probes is None else job.probes):
            if job.probes is None:
                v = torch.zeros_like(x)
                v.view(len(x), -1)[:, k] = 1.0
            else:
                v = torch.ones_like(x).copysign_(noise.draw(Draw(level, level), k, x))
            if job.forward:
                product = self._jvp(j, x, v, 0.0, cond)
            else:
                h = 10 * self.step * level.sigma * c_in
                product = self._ask(x + h * v, c_noise, level, cond)
                product = product - self._ask(x - h * v, c_noise, level, cond)
                product = product / (2 * h)
            for i in range(0, len(x), self.slice):
                part = _wide(product[i : i + self.slice]) * _wide(v[i : i + self.slice])
                total += len(part) * self._mean(part)
        return total / (job.probes or 1)

    def add(self, stage: int, j: int, chunk: int, sums: Array | None, l: Array) -> Array:
        """The sums of a level with one more chunk."""
        if stage == 0:
            more = self._diagonal(j, chunk)
            sums = more if sums is None else sums + more
        else:
            slope = _slope(l, self.job.lam, j, self.job.smoothing)
            sums = self._moments(j, chunk, sums, l[j], *slope)
        if not np.isfinite(sums).all():
            level = self.job.levels[j]
            raise FloatingPointError(
                f"network returned NaN or inf at t = {level.t:.6g} (sigma = {level.sigma:.6g}) "
                f"for samples {chunk * self.batch} to {(chunk + 1) * self.batch - 1}, from a "
                "finite input; look for overflow in half precision, or a wrong process or "
                "prediction"
            )
        return sums

    def finished(self, stage: int, j: int, sums: Array, l: Array) -> Array:
        """What the sums of a level come to: l, or (s, b)."""
        job = self.job
        if stage == 0:
            g_x, g_o, c_in = job.scalars[j, :3].tolist()
            return job.levels[j].alpha * (g_x + g_o * c_in * (sums / job.count))
        f, df, variance, covariance, noise = sums
        flat = variance <= noise
        s = np.where(flat, l[j] - 1, covariance / np.where(flat, 1.0, variance))
        return np.stack([s, df - s * f])

    def _moments(
        self, j: int, chunk: int, sums: Array | None, l: Array, dl: Array, off: Array
    ) -> Array:
        """Means and centred second moments (5, *size) with the chunk's samples added."""
        job, level = self.job, self.job.levels[j]
        g_x, g_o, c_in, c_noise, _ = job.scalars[j].tolist()
        dg_x, dg_o, _, _, rate = job.slopes[j].tolist()
        x, cond, _ = self._state(chunk, level)
        out = self._ask(x if c_in == 1 else c_in * x, c_noise, level, cond)
        change = self._total(j, x, out, cond, job.forward)
        device = _wide(x[:0]).device
        lt, dlt = (torch.from_numpy(np.array(v)).to(device) for v in (l, dl))
        # f = G - l y and f' = G' - l' y + l G as combinations of x, out and out'.
        x_rate, out_rate = rate - level.alpha * g_x, -level.alpha * g_o  # x' of x and out
        f_x = g_x - lt / level.alpha
        df_x = dg_x + g_x * x_rate - dlt / level.alpha + lt * g_x
        df_out = dg_o + g_x * out_rate + lt * g_o
        unsure = (_ROUNDING * _FINEST + torch.from_numpy(np.array(off)).to(device)) / level.alpha
        seen = chunk * self.batch
        for i in range(0, len(x), self.slice):
            X, O, dO = (_wide(v[i : i + self.slice]) for v in (x, out, change))
            f, df = f_x * X + g_o * O, df_x * X + df_out * O + g_o * dO
            # Where f varies by no more than this, s cannot be told: rounding (of the answers; of l,
            # which is in float64), and what is not known of l' in f'.
            noise = (_ROUNDING * self.accuracy * g_o * O).square() + (unsure * X).square()
            mean_f, mean_df = (v.mean(self.axes, keepdim=True) for v in (f, df))
            f, df = f - mean_f, df - mean_df
            parts = (mean_f, mean_df, f * f, f * df, noise)
            new = np.stack([self._mean(v) for v in parts])
            sums = new if sums is None else _merged(sums, seen, new, len(X))
            seen += len(X)
        assert sums is not None
        return sums

    def _mean(self, x: Tensor) -> Array:
        """Mean over a slice of the batch and what shares a coefficient, (*size)."""
        return x.mean(self.axes, keepdim=True).cpu().numpy().reshape(self.size)

    def check(self) -> Array:
        """Ask about two samples at three levels: answers to compare with those of an earlier part
        of this job; and see whether forward mode works and knows of the time."""
        answers = []
        for j in sorted({len(self.job.lam) * k // 4 for k in (1, 2, 3)}):
            level = self.job.levels[j]
            x, cond, _ = self._state(0, level)
            few = min(2, len(x))
            x, cond = x[:few], taken(cond, slice(0, few), len(x))
            _, _, c_in, c_noise, _ = self.job.scalars[j].tolist()
            out = self._ask(c_in * x, c_noise, level, cond)
            answers.append(_wide(out).cpu().numpy())
            if not self.job.forward:
                continue
            try:
                got = self._total(j, x, out, cond, True)
            except (NotImplementedError, RuntimeError) as error:
                self._total(j, x, out, cond, False)  # if that fails too, it is not the derivative
                raise ValueError(
                    f"derivative = 'forward', but the network has no forward-mode derivative "
                    f"({str(error).splitlines()[0]}); use derivative = 'difference'"
                ) from error
            want = self._total(j, x, out, cond, False)
            off, size = (float(_wide(v).square().mean().sqrt()) for v in (got - want, want))
            noise = self.rounding / self.step * float(_wide(out).square().mean().sqrt())
            if not off <= 0.2 * size + 20 * noise:
                raise ValueError(
                    f"derivative = 'forward', but at t = {level.t:.6g} the network's forward-mode "
                    f"derivative along the ODE is off by {off:.3g} from differences of size "
                    f"{size:.3g}: it detaches its time or looks it up; use derivative = "
                    "'difference'"
                )
        return np.stack(answers)


def _wide(x: Tensor) -> Tensor:
    """In float64, on the host where the device has none."""
    return x.to("cpu" if x.device.type == "mps" else x.device).double()


def _merged(a: Array, n: int, b: Array, m: int) -> Array:
    """Moments of n and m samples together."""
    share = m / (n + m)
    gap = b - a
    out = a + share * gap
    spread = (1 - share) * share
    out[2] += spread * gap[0] * gap[0]
    out[3] += spread * gap[0] * gap[1]
    return out


# Files and processes -----------------------------------------------------------------------------


class _Ranks:
    """The processes that share a job: one, unless torch.distributed is initialised."""

    def __init__(self, group: Any) -> None:
        self.group, self.rank, self.world, self.device = group, 0, 1, torch.device("cpu")
        d = torch.distributed
        if d.is_available() and d.is_initialized():
            self.rank, self.world = d.get_rank(group), d.get_world_size(group)
            if "gloo" not in str(d.get_backend(group)) and torch.cuda.is_available():
                self.device = torch.device("cuda")
        elif group is not None:
            raise ValueError(f"group = {group!r}, but torch.distributed is not initialised")

    def total(self, x: Tensor) -> Tensor:
        """The sum over processes."""
        if self.world == 1:
            return x
        x = x.to(self.device)
        torch.distributed.all_reduce(x, group=self.group)
        return x.cpu()

    def summed(self, value: float) -> float:
        """The sum over processes."""
        return float(self.total(torch.tensor([value], dtype=torch.float64)))

    def join(self, table: Array, mine: Sequence[int]) -> None:
        """Fill in the rows of the other processes. Every entry is a number and zeros: exact."""
        if self.world > 1:
            rows = np.zeros_like(table)
            rows[mine] = table[mine]
            table[:] = self.total(torch.from_numpy(rows)).numpy()


class _Store:
    """Sums so far, in memory and in a file: of each pass and level the number of chunks, and the
    result (`tables`: l; s and b) or the sums so far (`sums`).

    Written after a chunk, unless the last writing took more than a twentieth of the time since.
    """

    def __init__(self, path: Path | None, rank: int, work: _Work, seed: int) -> None:
        self.path, self.rank, self.chunks = path, rank, work.chunks
        self.about = work.describe(seed)
        self._digest = digest(self.about)
        n = len(work.job.lam)
        self.tables = (np.zeros((n, *work.size)), np.zeros((n, 2, *work.size)))
        self.done = np.zeros((2, n), dtype=np.int64)
        self.sums: dict[tuple[int, int], Array] = {}
        self.answers: Array | None = None
        self.seconds, self._wrote, self._took = 0.0, -np.inf, 0.0
        if path is None:
            return
        if not path.parent.is_dir():
            raise FileNotFoundError(f"path = {str(path)!r}: there is no such folder")
        for part in [path, *self._parts()]:
            if part.exists():
                read(part, self._parse)
        self._own = path if rank == 0 else path.with_name(f"{path.name}.rank{rank}")

    def _parts(self) -> list[Path]:
        assert self.path is not None
        stem = f"{self.path.name}.rank"
        near = self.path.parent.iterdir()
        return [p for p in near if p.name.startswith(stem) and p.name[len(stem) :].isdigit()]

    def beside(self, folder: Path) -> Path:
        """Where to keep samples: next to the own file, else in a temporary folder."""
        name = f"{self._digest}.samples"
        if self.path is None:
            return folder / name
        return self._own.with_name(f"{self._own.name}.{name}")

    def _parse(self, content: bytes) -> None:
        meta, tensors = _parsed(content, _FORMAT, "estimate_ems")
        try:
            about, seconds = json.loads(meta["about"]), float(meta["seconds"])
            for k in self.about:
                if about.get(k) != self.about[k]:
                    raise ValueError(
                        f"belongs to another job ({k}: {about.get(k)} there, {self.about[k]} "
                        "here); give another path, or delete it"
                    )
            there = tensors["done"].numpy()
            for stage, j in np.argwhere(there > self.done).tolist():
                if there[stage, j] == self.chunks:
                    self.tables[stage][j] = tensors[f"table.{stage}"][j].numpy()
                else:
                    self.sums[stage, j] = tensors[f"{stage}.{j}"].numpy()
                self.done[stage, j] = there[stage, j]
            self.seconds = max(self.seconds, seconds)
            if "answers" in tensors:
                self.answers = tensors["answers"].numpy()
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"lacks or garbles {error}; delete it and start over") from error

    def same_answers(self, answers: Array) -> None:
        """Refuse a network that answers differently from the one that the file is of. Another
        machine may round differently."""
        if self.answers is None:
            self.answers = answers
            return
        off, size = (np.sqrt(np.mean(v**2)) for v in (answers - self.answers, self.answers))
        if not off <= 1e-3 * size:
            raise ValueError(
                f"path = {str(self.path)!r} belongs to another network (its answers were of size "
                f"{size:.3g} and differ by {off:.3g}); give another path, or delete it"
            )

    def get(self, stage: int, j: int) -> tuple[int, Array | None]:
        return int(self.done[stage, j]), self.sums.get((stage, j))

    def put(
        self, stage: int, j: int, done: int, sums: Array, row: Array | None, seconds: float
    ) -> None:
        self.done[stage, j] = done
        self.sums[stage, j] = sums
        if row is not None:
            self.tables[stage][j] = row
            del self.sums[stage, j]
        if time.monotonic() - self._wrote >= 20 * self._took:
            self._write(seconds)

    def _write(self, seconds: float) -> None:
        if self.path is None:
            return
        begun = time.monotonic()
        tensors = _tensors({f"table.{i}": v for i, v in enumerate(self.tables)})
        tensors.update(_tensors({f"{i}.{j}": v for (i, j), v in self.sums.items()}))
        tensors["done"] = torch.from_numpy(self.done)
        if self.answers is not None:
            tensors["answers"] = torch.from_numpy(self.answers)
        meta = {"format": _FORMAT, "about": json.dumps(self.about), "seconds": repr(seconds)}
        write(self._own, to_bytes(tensors, meta))
        self._wrote = time.monotonic()
        self._took = self._wrote - begun

    def finish(self, seconds: float, ranks: _Ranks) -> None:
        """All levels are done, in all processes: the first one keeps them, the others nothing."""
        if self.path is None:
            return
        self.done[:] = self.chunks
        if ranks.rank == 0:
            self._write(seconds)
        ranks.summed(0.0)  # nothing goes before it is written
        gone = self._parts() if ranks.rank == 0 else [self._own]
        for part in [*gone, *self.path.parent.glob(f"{self.path.name}.*{self._digest}.samples")]:
            part.unlink(missing_ok=True)
