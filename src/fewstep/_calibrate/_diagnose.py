r"""What a network's times and output mean, found from the network and clean data.

Data x_0 are noised to y = x_0 + rho eps at a few levels rho, the same for every hypothesis. A
hypothesis (process, prediction, network time) says how y is fed to the network, x_in = c_in alpha y
at c_noise, and how its output is read, D = p x + q out. Only the right reading is near E[x_0 | y]:

    R = E |D - x_0|^2 / W,     W = d v rho^2 / (v + rho^2),     score = geometric mean of R over rho

with v the variance of the data over samples and elements and d their number: W is the error of the
Wiener filter, the best that is known without a network, so a score below 1 is better than that.
With the weight 1 / W every level counts alike: at low noise R is the error of the noise, at high
noise that of the data.

Output that is 0 is read as D = p x; a hypothesis must be better than that (its output must help)
and no worse than the Wiener filter, or nothing fits. Differences of log scores are paired: samples
and noise are the same, and the standard error is that of the mean over samples of the influence
sum_i (R_ik / R_i - 1) / n of sample k on the difference.

An evaluation depends on x_in and c_noise alone, so all readings share it: three inner products per
sample, of the output with x_0, eps and itself, are what any reading needs.

What cannot be told apart, whatever the data: conventions that read the same outputs as the same D.
All processes on a clock of the noise level (rho, lambda, log(rho) / 4) whose inputs have the same
scale; "edm" with sigma_data = 1 and -v; a shifted flow and a flow, which differ in where a sampler
steps and not in what the network is told. With one kind of data only: on standard normal data a
flow is its own mirror image (time 1 - t, output negated), and v is 0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._denoiser import Denoiser, Model, check_output, device_of, told_integers
from .._noise import start_noise
from .._prediction import (
    Prediction,
    Time,
    as_prediction,
    edm,
    unknown,
)
from .._prediction import predictions as known_predictions
from .._process import EDM, VE, VP, Array, CosineVP, DiscreteVP, Flow, Level, Process

__all__ = ["Diagnosis", "Fit", "Hypothesis", "diagnose"]

#: Standard errors at which a difference counts.
_SURE = 4.0
#: Data predictions are the same if they differ by this share of their squared error.
_SAME = 0.01
#: Differences of log scores that are rounding, of float32 times for one.
_ROUNDING = 1e-4
#: And if then their log scores differ by less than this, both will do: levels at integer times are
#: not quite the same for all, which significance would take for evidence.
_SLIGHT = 0.02
#: The most of the Wiener filter's error that is evidence, and that is beyond doubt.
_BETTER, _CONVINCING = 0.95, 0.6
#: Elements that one score is averaged over, at least: more samples where samples are small.
_ELEMENTS = 1024
#: How much worse a usual reading of rescaled data may fit than an unusual one of the data as given.
_OCCAM = 1.4
#: Worse than this times the best, and surely so, is asked no more: after the first round, later.
_BEHIND = (1.5, 1.2)
#: Doublings of the number of samples while different denoisers fit alike.
_DOUBLINGS = 2


@dataclass(frozen=True)
class Clock:
    """A network time offset + factor t, for `Denoiser(time=...)`."""

    offset: float
    factor: float

    def __call__(self, level: Level) -> Any:
        return self.offset + self.factor * level.t


def _log_rho(level: Level) -> Any:
    return -level.lam


@dataclass(frozen=True, eq=False)
class Hypothesis:
    """A process, a prediction (with the network's time in it), and what the three are called."""

    process: Process
    prediction: Prediction
    names: tuple[str, str, str]

    def __str__(self) -> str:
        return f"{self.names[0]}, predicts {self.names[1]}, told {self.names[2]}"


@dataclass(frozen=True, eq=False)
class Fit:
    """How a hypothesis fits.

    score: squared error of the data prediction over that of the Wiener filter, geometric mean over
        levels, from `samples` samples; nan where the network gave no answer, `failure` says why.
    ratio: to the score of the best, on the samples both were asked about.
    sigmas: log ratio over its standard error (0 for the best).
    """

    hypothesis: Hypothesis
    score: float
    ratio: float
    sigmas: float
    samples: int
    failure: str = ""


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `diagnose` found; print it.

    fits: the best hypothesis is a denoiser of the data.
    certain: it fits, better than the Wiener filter (score below 0.95); all that are not
        surely worse read the network as the same denoiser; and there is no hint.
    equivalent: the others that are not surely worse. same: those of them whose data predictions are
        those of the best (to 10 % of its error).
    sentence: the finding. hint: what to do about the data, or "".
    rescale: (a, b) where the network fits data a x + b much better, or None.
    table: all hypotheses, best first. levels: lambda where they were compared.
    calls, evaluations: of the network, and samples in them.
    failure: the first exception of the network, or None.
    """

    best: Hypothesis
    fits: bool
    certain: bool
    equivalent: tuple[Hypothesis, ...]
    same: tuple[Hypothesis, ...]
    sentence: str
    hint: str
    rescale: tuple[float, float] | None
    table: tuple[Fit, ...]
    levels: tuple[float, ...]
    calls: int
    evaluations: int
    failure: Exception | None = field(repr=False)
    _network: Callable[..., Tensor] = field(repr=False)
    _dtype: torch.dtype = field(repr=False)

    @property
    def score(self) -> float:
        """Score of the best."""
        return self.table[0].score

    def denoiser(self) -> Denoiser:
        """The network under the best hypothesis, ready to sample. Refused if nothing fits."""
        if not self.fits:
            raise ValueError(f"no denoiser: {self.sentence}") from self.failure
        best = self.best
        return Denoiser(self._network, best.process, best.prediction, dtype=self._dtype)

    def __str__(self) -> str:
        lines = [self.sentence, *([self.hint] if self.hint else []), ""]
        lines += [f"{'score':>9} {'ratio':>9} {'sigmas':>7} {'n':>5}  hypothesis"]
        shown, marks = self.table[:12], {*map(id, self.equivalent), id(self.best)}
        for fit in shown:
            mark = "=" if id(fit.hypothesis) in marks and self.fits else " "
            if fit.failure:
                numbers = f"{'-':>9} {'-':>9} {'-':>7}"
            else:
                numbers = f"{fit.score:9.3g} {fit.ratio:9.3g} {fit.sigmas:7.1f}"
            text = str(fit.hypothesis) + (f": {fit.failure}" if fit.failure else "")
            lines.append(f"{numbers} {fit.samples:5d}{mark} {text}")
        rest = self.table[len(shown) :]
        failed = sum(bool(fit.failure) for fit in rest)
        if rest:
            lines.append(f"{len(rest)} more hypotheses ({failed} of them got no answer)")
        low, high = self.levels[0], self.levels[-1]
        lines += [
            "",
            "score: squared error over the Wiener filter's; = not surely worse than the best",
            f"{self.calls} calls, {self.evaluations} evaluations, {len(self.levels)} levels from "
            f"lambda = {low:.2f} to {high:.2f}",
        ]
        return "\n".join(lines)


def diagnose(
    network: Callable[..., Tensor],
    data: Tensor,
    *,
    cond: Mapping[str, Any] | None = None,
    processes: Mapping[str, Process] | Sequence[Process] | None = None,
    predictions: Mapping[str, Prediction] | Sequence[str | Prediction] | None = None,
    times: Mapping[str, Time] | Sequence[Time] | None = None,
    levels: int = 6,
    count: int | None = None,
    seed: int = 0,
    rescale: bool = True,
    batch: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Diagnosis:
    """Which process, prediction and time convention a network was trained with.

    network: called as network(x_in, t_in, **cond), as in `Denoiser`: the raw network, without
        guidance and without a scheduler's scalings.
    data: clean samples as it was trained on, (n, *sample), n >= 2; some tens.
    cond: keyword arguments of the network; tensors and lists with n entries are per sample, also
        in nested mappings.
    processes: to try; default VP, cosine and trigonometric paths, the usual tables, flow, EDM, VE.
    predictions: to try, by name ("-" in front negates: "-flow" is x_0 - eps) or as `Prediction`;
        default all, EDM's with sigma_data = 0.5, 1 and the standard deviation of the data.
    times: to try, as in `Denoiser`; default what is usual for each process: t, 1000 t, reversed,
        integers for tables, sigma, rho, lambda, log(rho), log(rho) / 4.
    levels: number of noise levels, equally spaced in lambda where all processes have them.
    count: samples per level for the hypotheses that are close to the best (data are used again,
        with new noise, if there are fewer); default 32, and more where samples are small. Most
        are given up after four, at every second level; up to four times as many are taken while
        different denoisers fit alike.
    rescale: look for another scaling of the data that fits much better.
    batch: samples per call; default: as many as there are to ask about. dtype, device: of the
        network's input; device by default where the network lives.

    A network that raises or answers with nan or infinity speaks against the hypothesis. Running out
    of memory is raised.
    """
    if isinstance(network, Model):
        raise ValueError(
            f"network is a {type(network).__name__}, which has its conventions already; give the "
            "raw network"
        )
    if not callable(network):
        raise ValueError(f"network = {network!r} is not callable; give network(x, t)")
    x = _clean(data)
    for name, value, least in (("levels", levels, 2), ("count", count, 8), ("batch", batch, 1)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{name} = {value!r}; need an integer >= {least}")
    if cond is not None and not isinstance(cond, Mapping):
        raise ValueError(f"cond = {cond!r}; need a mapping of the network's keyword arguments")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype = {dtype}; need a floating-point dtype")
    elements = x[0].numel()
    count = max(32, -(-_ELEMENTS // elements)) if count is None else count
    named = _processes(processes)
    where = device_of(network) if device is None else torch.device(device)
    asker = _Asker(network, dict(cond or {}), dtype, where, batch or count)

    def experiment(scaling: tuple[float, float], count: int) -> _Experiment:
        scaled = scaling[0] * x + scaling[1]
        lambdas = _lambdas(named, levels, float(scaled.std(correction=0)))
        return _Experiment(asker, scaled, lambdas, count, seed)

    def hypotheses(std: float) -> list[Hypothesis]:
        return _hypotheses(named, _predictions(predictions, std), times)

    plain = experiment((1.0, 0.0), count)
    found = plain.rank(hypotheses(plain.std))
    hint, scaling, rescaled = "", None, math.inf
    ours = processes is predictions is times is None  # the names are those of `_usual`
    odd = ours and found.certain and not _usual(found.best.names)
    # A network that never answered will not answer rescaled data.
    for a, b in _scalings(x) if rescale and not found.table[0].failure else ():
        other = experiment((a, b), min(count, max(8, _ELEMENTS // 2 // elements)))
        convincing = found.certain and found.score < _CONVINCING
        tried = hypotheses(other.std)
        if odd:  # wrongly scaled data, read by a convention that nobody uses, can fit well
            best = other.rank([h for h in tried if _usual(h.names)])
            if best.fits and best.score < min(rescaled, _OCCAM * found.score):
                rescaled, scaling = best.score, (a, b)
                hint = (
                    f"That is an unusual combination. Are the data scaled as in training? {a:.4g} "
                    f"data {'-' if b < 0 else '+'} {abs(b):.4g} fits a usual one: score "
                    f"{best.score:.3g}, {best.best}."
                )
            continue
        if convincing:  # the same inputs, but for edm's sigma_data
            tried = [h for h in tried if h.names[::2] == found.best.names[::2]]
        best = other.rank(tried)
        enough = min(rescaled, _BETTER, found.score / _BEHIND[0] if found.fits else math.inf)
        if not best.fits or best.score >= enough:
            continue
        rescaled, scaling = best.score, (a, b)
        hint = (
            f"Are the data scaled as in training? {a:.4g} data {'-' if b < 0 else '+'} "
            f"{abs(b):.4g} fits much better: score {best.score:.3g}, {best.best}."
        )
    return replace(
        found,
        certain=found.certain and not hint,
        hint=hint,
        rescale=scaling,
        calls=asker.calls,
        evaluations=asker.evaluations,
    )


class _Asker:
    """The network, asked about one level at a time; counts what it is asked."""

    def __init__(
        self,
        network: Callable[..., Tensor],
        cond: Mapping[str, Any],
        dtype: torch.dtype,
        device: torch.device,
        batch: int,
    ) -> None:
        self.network, self.cond, self.dtype = network, cond, dtype
        self.device, self.batch = device, batch
        self.calls = self.evaluations = 0
        self.failure: Exception | None = None

    def __call__(self, x: Tensor, t: float, whole: bool, first: int, data: int) -> Tensor | str:
        """The output for x, (n, *sample), on the host in float64; or why there is none. Sample k
        has the condition of the datum (first + k) modulo `data`."""
        kind = torch.int64 if whole else torch.promote_types(self.dtype, torch.float32)
        outputs: list[Tensor] = []
        for start in range(0, len(x), self.batch):
            part = x[start : start + self.batch].to(self.device, self.dtype)
            index = [(first + start + k) % data for k in range(len(part))]
            told = torch.full((len(part),), t, dtype=torch.float64).to(self.device, kind)
            cond = {k: _taken(v, index, data) for k, v in self.cond.items()}
            self.calls += 1
            self.evaluations += len(part)
            try:
                # Wrong times are what networks warn about.
                with warnings.catch_warnings(), torch.no_grad():
                    warnings.simplefilter("ignore")
                    out = self.network(part, told, **cond)
                check_output(out, part)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:
                self.failure = self.failure or error
                return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            out = out.detach().to("cpu", torch.float64)
            if not bool(torch.isfinite(out).all()):
                return "the output is not finite"
            outputs.append(out)
        return torch.cat(outputs)


class _Cell:
    """The network's answers at one input: x_in = a x_0 + s eps, told t."""

    def __init__(self, a: float, s: float, t: float, whole: bool) -> None:
        self.a, self.s, self.t, self.whole = a, s, t, whole
        self.outputs: list[Tensor] = []
        self.products = np.empty((3, 0))  # <out, x_0>, <out, eps>, <out, out> per sample
        self.failure = ""

    def fill(self, e: _Experiment, n: int) -> None:
        """Ask about the samples up to n that were not asked about."""
        have = self.products.shape[1]
        if self.failure or have >= n:
            return
        x, eps = e.x[have:n], e.eps[have:n]
        out = e.ask(self.a * x + self.s * eps, self.t, self.whole, have, len(e.data))
        if isinstance(out, str):
            self.failure = out
            return
        self.outputs.append(out)
        new = np.stack([_dot(out, x), _dot(out, eps), _dot(out, out)])
        self.products = np.concatenate([self.products, new], axis=1)


@dataclass(eq=False)
class _Reading:
    """A hypothesis at the levels: where its answers are, and D - x_0 = u x_0 + w eps + q out."""

    hypothesis: Hypothesis
    cells: list[_Cell]
    rho: Array
    scalars: Array  # (levels, 3)


@dataclass(frozen=True, eq=False)
class _Score:
    """Mean of log R over levels, and its derivative in the weight of each sample."""

    log: float
    influence: Array

    def behind(self, best: _Score) -> tuple[float, float]:
        """Difference to the best's, and the same over its standard error."""
        gap = self.log - best.log
        spread = (self.influence - best.influence).std(ddof=1) / math.sqrt(len(self.influence))
        return gap, gap / math.hypot(spread, _ROUNDING)


class _Experiment:
    """Noisy data at some levels, and what the network answers to them."""

    def __init__(self, ask: _Asker, data: Tensor, lambdas: Array, count: int, seed: int) -> None:
        self.ask, self.data, self.lambdas, self.count, self.seed = ask, data, lambdas, count, seed
        self.std, self.elements = float(data.std(correction=0)), data[0].numel()
        self.x = self.eps = data[:0]
        self.products = np.empty((5, 0))  # what any reading needs of x_0 and eps, per sample
        self._cells: dict[tuple[float, ...], _Cell] = {}
        self._levels: dict[Process, list[Level]] = {}

    def extend(self, n: int) -> None:
        """Make n noisy samples: sample k from datum k modulo their number."""
        have = len(self.x)
        if n <= have:
            return
        x = self.data[torch.arange(have, n) % len(self.data)]
        eps = start_noise(x.shape, self.seed, first=have, dtype=torch.float64)
        centred = x - self.data.mean()
        pairs = ((x, x), (eps, eps), (x, eps), (centred, centred), (centred, eps))
        new = np.stack([_dot(*pair) for pair in pairs])
        self.x, self.eps = torch.cat([self.x, x]), torch.cat([self.eps, eps])
        self.products = np.concatenate([self.products, new], axis=1)

    def reading(self, hypothesis: Hypothesis) -> _Reading:
        """Cells and scalars of a hypothesis; cells are shared."""
        process, prediction = hypothesis.process, hypothesis.prediction
        cells, rho, scalars = [], [], []
        if process not in self._levels:
            times = [float(process.time(lam)) for lam in self.lambdas]
            times = [round(t) if process.integer_times else t for t in times]
            self._levels[process] = [process.level(t) for t in times]
        for level in self._levels[process]:
            p, q, c_in, told = map(float, prediction.scalars(level))
            whole = told_integers(process.integer_times, prediction)
            cell = (c_in * level.alpha, c_in * level.sigma, told)
            key = tuple(float(f"{v:.9g}") for v in cell)
            cells.append(self._cells.setdefault((*key, whole), _Cell(*cell, whole)))
            rho.append(level.rho)
            scalars.append((p * level.alpha - 1, p * level.sigma, q))
        return _Reading(hypothesis, cells, np.array(rho), np.array(scalars))

    def score(self, r: _Reading, at: Sequence[int], n: int, gain: float = 1.0) -> _Score:
        """Of a reading, from n samples at levels; gain = 0: as if the output were 0."""
        errors, (xx, ee, xe) = [], self.products[:3, :n]
        for i in at:
            u, w, q = r.scalars[i] * (1.0, 1.0, gain)
            a, b, c = r.cells[i].products[:, :n]
            errors.append(
                u * (u * xx + 2 * w * xe) + w * w * ee + q * (2 * (u * a + w * b) + q * c)
            )
        return self._score(np.array(errors), r.rho, at)

    def wiener(self, r: _Reading, at: Sequence[int], n: int) -> _Score:
        """Of the Wiener filter on the same samples."""
        g = self.std**2 / (self.std**2 + r.rho[at] ** 2)
        u, w = (g - 1)[:, None], (g * r.rho[at])[:, None]
        _, ee, _, cc, ce = self.products[:, :n]
        return self._score(u * (u * cc + 2 * w * ce) + w * w * ee, r.rho, at)

    def _score(self, errors: Array, rho: Array, at: Sequence[int]) -> _Score:
        v, rho = self.std**2, rho[at]
        ratios = errors / (self.elements * v * rho**2 / (v + rho**2))[:, None]
        R = np.maximum(ratios.mean(1), 1e-12)  # 0 for a network that knows these data by heart
        log, lam = np.log(R), -np.log(rho)
        # Integer times are beside the level that was meant; R changes along the way.
        if len(at) > 1 and bool((np.diff(lam) > 0).all()):
            log = log + np.gradient(log, lam) * (self.lambdas[at] - lam)
        return _Score(float(log.mean()), (ratios / R[:, None] - 1).mean(0))

    def distance(self, one: _Reading, best: _Reading) -> float:
        """Mean square of the difference of two data predictions, over that of the best's error."""
        parts = []
        for i in range(len(self.lambdas)):
            errors = []
            for r in (one, best):
                (u, w, q), out = r.scalars[i], torch.cat(r.cells[i].outputs)
                errors.append(u * self.x + w * self.eps + q * out)
            apart = float((errors[0] - errors[1]).square().sum())
            parts.append(apart / max(float(errors[1].square().sum()), 1e-300))
        return float(np.mean(parts))

    def rounds(self) -> list[tuple[list[int], int]]:
        """Levels and samples of each round: few of both first."""
        every, elements = list(range(len(self.lambdas))), self.elements
        first, then = max(4, _ELEMENTS // 4 // elements), max(8, _ELEMENTS // 2 // elements)
        some = every[::2] if len(every) > 3 else every
        return [(on, min(n, self.count)) for on, n in ((some, first), (every, then))] + [
            (every, self.count)
        ]

    def rank(self, hypotheses: Sequence[Hypothesis]) -> Diagnosis:
        """Ask, giving up what is surely behind after every round, and conclude."""
        live = [self.reading(h) for h in hypotheses]
        done: list[Fit] = []
        at, n, behind = [], 0, _BEHIND[0]
        for at, n in self.rounds():
            live = self._round(live, done, at, n, behind)
            behind = _BEHIND[1]
        for _ in range(_DOUBLINGS):
            if not live:
                break
            close, same = self._close(live, at, n)
            if len(close) == len(same) or self.score(same[0], at, n).log > math.log(_BETTER):
                break
            n *= 2
            live = self._round(live, done, at, n, math.exp(_SLIGHT))
        return self._conclude(live, done, at, n) if live else self._unanswered(done)

    def _round(
        self, live: list[_Reading], done: list[Fit], at: Sequence[int], n: int, behind: float
    ) -> list[_Reading]:
        """Ask for n samples at levels; those that stay. What is given up goes to `done`."""
        self.extend(n)
        scores: dict[_Reading, _Score] = {}
        for r in live:
            for i in at:
                r.cells[i].fill(self, n)
                if r.cells[i].failure:
                    done.append(
                        Fit(r.hypothesis, math.nan, math.nan, math.nan, 0, r.cells[i].failure)
                    )
                    break
            else:
                scores[r] = self.score(r, at, n)
        if not scores:
            return []
        best, stay = min(scores.values(), key=lambda s: s.log), []
        for r, score in scores.items():
            gap, sigmas = score.behind(best)
            if gap > math.log(behind) and sigmas > _SURE:
                done.append(_fit(r, score, gap, sigmas, n))
            else:
                stay.append(r)
        kept = {id(c) for r in stay for c in r.cells}
        for cell in self._cells.values():
            if id(cell) not in kept:
                cell.outputs = []
        return stay

    def _close(
        self, live: list[_Reading], at: Sequence[int], n: int
    ) -> tuple[list[_Reading], list[_Reading]]:
        """Those that are not surely worse than the first, best one; and those of them that give
        the same data predictions."""
        scores = {r: self.score(r, at, n) for r in live}
        order = sorted(live, key=lambda r: scores[r].log)
        best, close, same = order[0], [], []
        for r in order:
            gap, sigmas = scores[r].behind(scores[best])
            if sigmas <= _SURE or gap <= _SLIGHT:
                alike = self.distance(r, best) <= _SAME
                close += [r] if alike or sigmas <= _SURE else []
                same += [r] if alike else []
        return close, same

    def _conclude(
        self, live: list[_Reading], done: list[Fit], at: Sequence[int], n: int
    ) -> Diagnosis:
        scores = {r: self.score(r, at, n) for r in live}
        close, same = self._close(live, at, n)
        # Likely ones are listed first: of what is the same as far as can be seen, the first.
        gaps = {r: scores[r].behind(scores[close[0]]) for r in same}
        best = next(r for r in live if r in gaps and (gaps[r][0] < _SLIGHT / 4 or gaps[r][1] <= 1))
        done += [_fit(r, scores[r], *scores[r].behind(scores[best]), n) for r in live]
        done.sort(key=lambda f: (f.hypothesis is not best.hypothesis, f.failure != "", f.ratio))
        good = scores[best]
        worse, sure = good.behind(self.wiener(best, at, n))
        help_, helped = self.score(best, at, n, gain=0.0).behind(good)
        fits = not (worse > 0 and sure > _SURE) and helped > _SURE and help_ > 0
        better = good.log < math.log(_BETTER)
        equivalent = tuple(r.hypothesis for r in close if r is not best)
        alike = tuple(r.hypothesis for r in same if r is not best)
        apart = [r for r in close if r not in same]
        name = str(best.hypothesis)
        if not fits and helped <= _SURE:
            sentence = (
                f"Nothing fits: under the best hypothesis ({name}) the output is no better than 0 "
                f"there (score {math.exp(good.log):.3g})."
            )
        elif not fits:
            sentence = (
                f"Nothing fits: the best hypothesis ({name}) has {math.exp(good.log):.3g} times "
                "the error of the Wiener filter; the network is no denoiser of these data."
            )
        elif not better:
            sentence = (
                f"{name} fits best, but no better than the Wiener filter (score "
                f"{math.exp(good.log):.3g}): the data are Gaussian and white, or the network is no "
                "denoiser of them."
            )
        elif apart:
            sentence = (
                f"Cannot tell: {name} and {apart[0].hypothesis} fit alike "
                f"(score {math.exp(good.log):.3g}) but are different denoisers."
            )
        else:
            sentence = f"{name}: {math.exp(good.log):.3g} times the error of the Wiener filter"
            rest = [
                f
                for f in done
                if not f.failure and f.hypothesis not in (best.hypothesis, *equivalent)
            ]
            if rest:
                sentence += (
                    f"; the next that differs, {rest[0].hypothesis}, has {rest[0].ratio:.3g} "
                    f"times its score ({rest[0].sigmas:.0f} standard errors)"
                )
            sentence += "."
            if alike:
                more = f" and {len(alike) - 3} more" if len(alike) > 3 else ""
                sentence += f" The same denoiser: {'; '.join(map(str, alike[:3]))}{more}."
        return self._diagnosis(
            best.hypothesis, fits, fits and better and not apart, equivalent, alike, sentence, done
        )

    def _unanswered(self, done: list[Fit]) -> Diagnosis:
        done.sort(key=lambda f: f.failure == "")
        sentence = f"Nothing fits: the network gave no answer to any question ({done[0].failure})."
        return self._diagnosis(done[0].hypothesis, False, False, (), (), sentence, done)

    def _diagnosis(
        self,
        best: Hypothesis,
        fits: bool,
        certain: bool,
        equivalent: tuple[Hypothesis, ...],
        same: tuple[Hypothesis, ...],
        sentence: str,
        table: list[Fit],
    ) -> Diagnosis:
        ask = self.ask
        return Diagnosis(
            best=best,
            fits=fits,
            certain=certain,
            equivalent=equivalent,
            same=same,
            sentence=sentence,
            hint="",
            rescale=None,
            table=tuple(table),
            levels=tuple(self.lambdas.tolist()),
            calls=ask.calls,
            evaluations=ask.evaluations,
            failure=ask.failure,
            _network=ask.network,
            _dtype=ask.dtype,
        )


def _fit(r: _Reading, score: _Score, gap: float, sigmas: float, n: int) -> Fit:
    return Fit(r.hypothesis, math.exp(score.log), math.exp(gap), sigmas, n)


def _dot(a: Tensor, b: Tensor) -> Array:
    """Inner product of every sample."""
    return (a * b).flatten(1).sum(1).numpy() if a.ndim > 1 else (a * b).numpy()


def _taken(value: Any, index: list[int], data: int) -> Any:
    """A condition for these data: entries of what has one for each."""
    if isinstance(value, Mapping):
        return {k: _taken(v, index, data) for k, v in value.items()}
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim and len(value) == data:
        return value[index]
    if isinstance(value, (list, tuple)) and len(value) == data:
        return type(value)([value[i] for i in index])
    return value


def _clean(data: Any) -> Tensor:
    """The data on the host in float64."""
    if not isinstance(data, (Tensor, np.ndarray)):
        raise ValueError(f"data is {type(data).__name__}; need a tensor of samples (n, *sample)")
    x = torch.as_tensor(data).detach().to("cpu", torch.float64)
    if x.ndim < 1 or len(x) < 2 or not x.numel() or not bool(torch.isfinite(x).all()):
        raise ValueError(
            f"data has shape {tuple(x.shape)}; need n >= 2 finite samples (n, *sample)"
        )
    if float(x.std(correction=0)) == 0:
        raise ValueError("data does not vary: all elements of all samples are equal")
    return x


def _usual(names: tuple[str, str, str]) -> bool:
    """Whether networks like this are common: of the default hypotheses, by their names."""
    process, predicts, told = names
    if process in ("EDM", "VE"):
        clocks = ("sigma", "rho", "log(rho)", "log(rho) / 4", "t")
        kinds = ("edm", "data", "noise", "score")
    elif process == "flow":
        clocks = ("t", "1000 t", "1 - t", "1000 (1 - t)")
        kinds = ("flow", "-flow", "data", "noise", "v")
    else:
        clocks = ("t", "1000 t", "its integers", "its integers as floats")
        kinds = ("data", "noise", "v", "score")
    return told in clocks and predicts.startswith(kinds)


def _scalings(x: Tensor) -> list[tuple[float, float]]:
    """(a, b) of other scalings a x + b that data like these are often given in."""
    low, high = np.quantile(x.numpy(), (0.02, 0.98))  # a few values may be outside
    mean, std = float(x.mean()), float(x.std(correction=0))
    options = [(1 / std, 0.0), (1 / std, -mean / std), (0.5 / std, -0.5 * mean / std)]
    if low >= -0.1 and high <= 1.1:
        options.insert(0, (2.0, -1.0))
    elif low >= -1.1 and high <= 1.1:
        options.insert(0, (0.5, 0.5))
    elif low >= -20 and high <= 275:
        options[:0] = [(2 / 255, -1.0), (1 / 255, 0.0)]
    options += [(2.0, 0.0), (0.5, 0.0)]
    return [(a, b) for a, b in options if abs(math.log(a)) > 0.1 or abs(b) > 0.1 * std]


def _lambdas(processes: Mapping[str, Process], count: int, std: float) -> Array:
    """Levels that all processes have; rho from exp(-3.5) to exp(3.5) times std where that leaves
    enough of them."""
    low = max(float(p.lam(p.t_start)) for p in processes.values())
    high = min(float(p.lam(p.t_end)) for p in processes.values())
    if high - low < 1:
        raise ValueError(
            f"processes: {', '.join(processes)} share too few noise levels (lambda from {low:.3g} "
            f"to {high:.3g}); give fewer processes"
        )
    inner = max(low, -math.log(std) - 3.5), min(high, -math.log(std) + 3.5)
    if inner[1] - inner[0] >= 2 or math.isinf(high - low):
        low, high = inner
    margin = 0.03 * (high - low)
    return np.linspace(low + margin, high - margin, count)


def _processes(given: Any) -> dict[str, Process]:
    if given is None:
        table = DiscreteVP.scaled_linear()
        return {
            "EDM": EDM(),
            "VE": VE(),
            "linear table": DiscreteVP.linear(),
            "scaled-linear table": table,
            "scaled-linear table, zero terminal SNR": table.zero_terminal_snr(),
            "squared-cosine table": DiscreteVP.squared_cosine(),
            "VP": VP(),
            "cosine VP": CosineVP(),
            "trigonometric": CosineVP(s=0.0),
            "flow": Flow(),
        }
    if not isinstance(given, Mapping):
        given = {repr(p): p for p in _several("processes", given)}
    if not given or not all(isinstance(p, Process) for p in given.values()):
        raise ValueError(f"processes = {given!r}; need one or more, for example [fewstep.VP()]")
    return dict(given)


def _several(name: str, given: Any) -> list[Any]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ValueError(f"{name} = {given!r}; need a list, or a mapping of names to them")
    values = list(given)
    if not values:
        raise ValueError(f"{name} is empty; leave it out to try all")
    return values


def _negated(p: Prediction) -> Prediction:
    def flipped(
        scalars: Callable[[Level], tuple[Any, Any]], first: float, second: float
    ) -> Callable[[Level], tuple[Any, Any]]:
        def both(level: Level) -> tuple[Any, Any]:
            one, two = scalars(level)
            return first * one, second * two

        return both

    return replace(
        p,
        name=f"-{p.name}",
        to_data=flipped(p.to_data, 1, -1),
        from_data=flipped(p.from_data, -1, -1),
    )


def _predictions(given: Any, std: float) -> dict[str, Prediction]:
    if given is None:
        names = ("noise", "data", "v", "flow", "-flow", "-v", "-noise", "score", "-score")
        made = _predictions(names, std)
        scales = dict.fromkeys((0.5, 1.0, float(f"{std:.2g}")))
        return {**made, **{f"edm({s:g})": edm(s) for s in scales}}
    if isinstance(given, Mapping):
        return {name: as_prediction(p) for name, p in given.items()}
    found: dict[str, Prediction] = {}
    for p in _several("predictions", given):
        if not isinstance(p, str):
            made = as_prediction(p)
            found[made.name if made.name not in found else f"{made.name} {len(found)}"] = made
        elif p.removeprefix("-") not in known_predictions:
            raise ValueError(unknown("predictions", p, known_predictions))
        else:
            made = known_predictions[p.removeprefix("-")]
            found[p] = _negated(made) if p.startswith("-") else made
    return found


def _times(given: Any, process: Process) -> dict[str, Time]:
    """Network times by name, likely ones first."""
    if isinstance(given, Mapping):
        return dict(given)
    if given is not None:
        return {t if isinstance(t, str) else _called(t): t for t in _several("times", given)}
    if process.integer_times:
        n = int(max(process.t_start, process.t_end)) + 1
        return {"its integers": "t", "its integers as floats": 1.0, f"t / {n}": 1 / n}
    general: dict[str, Time] = {
        "sigma": "sigma",
        "lambda": "lambda",
        "log(rho) / 4": "edm",
        "log(rho)": _log_rho,
        "rho": "rho",
    }
    if max(process.t_start, process.t_end) > 1:
        return {**general, "t": "t"}
    angle: dict[str, Time] = {"pi t / 2": math.pi / 2} if isinstance(process, CosineVP) else {}
    return {
        "t": "t",
        "1000 t": 1000.0,
        "1 - t": Clock(1.0, -1.0),
        "1000 (1 - t)": Clock(1000.0, -1000.0),
        **angle,
        **general,
    }


def _called(time: Any) -> str:
    return (
        f"{time:g} t" if isinstance(time, (int, float)) else getattr(time, "__name__", repr(time))
    )


def _hypotheses(
    processes: Mapping[str, Process], predictions: Mapping[str, Prediction], times: Any
) -> list[Hypothesis]:
    """Every combination that can be."""
    found = [
        Hypothesis(process, as_prediction(prediction, time), (name, predicts, told))
        for name, process in processes.items()
        for told, time in _times(times, process).items()
        for predicts, prediction in predictions.items()
        if not (prediction.needs_score and process.no_score)
    ]
    if not found:
        raise ValueError("predictions: scores only, and no process has a score")
    return sorted(found, key=lambda h: h.names[2].startswith("t / "))  # tables so read: unlikely
