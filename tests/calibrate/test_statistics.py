"""Estimated statistics: closed forms, official tables, resuming, processes, memory, refusals."""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fewstep as fs
from fewstep._calibrate._ems import EMS
from fewstep._calibrate._statistics import estimate_ems
from fewstep.exact import ExactModel, Gaussian, Mixture

# torch scripts the rules of forward mode when it is first used.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)

GOLDEN = Path(__file__).parents[1] / "golden"
TABLE = fs.DiscreteVP.linear()
CONTINUOUS = fs.DiscreteVP(TABLE.log_alphas, TABLE.name, integer_times=False)
PROCESSES = {"edm": fs.EDM(), "vp": fs.VP(), "flow": fs.Flow(), "table": CONTINUOUS}
SIGMA_DATA = 0.5


def denoiser(model: ExactModel, process: fs.Process, predicts: str) -> fs.Denoiser:
    """An exact model as a network that is differentiable in its time (it is told lambda)."""
    convention = fs.edm(SIGMA_DATA) if predicts == "edm" else fs.predictions[predicts]

    def network(x_in: Tensor, lam: Tensor) -> Tensor:
        each = (-1, *(1 for _ in x_in.shape[1:]))
        rho = torch.exp(-lam)
        if isinstance(process, fs.EDM):
            alpha = torch.ones_like(rho)
        elif isinstance(process, fs.Flow):
            alpha = 1 / (1 + rho)
        else:
            alpha = torch.rsqrt(1 + rho**2)
        sigma, c_in = rho * alpha, torch.ones_like(rho)
        if predicts == "edm":
            square = sigma**2 + (SIGMA_DATA * alpha) ** 2
            c_in = torch.rsqrt(square)
            p, q = SIGMA_DATA**2 * alpha / square, sigma * SIGMA_DATA * c_in
            u, w = -p / q, 1 / q
        else:
            u, w = convention.from_data(fs.Level(None, alpha, sigma, lam))
        D, eps = model.predict(x_in / c_in.reshape(each), alpha, sigma)
        return (u * alpha + w).reshape(each) * D + (u * sigma).reshape(each) * eps

    return fs.Denoiser(network, process, convention, "lambda")


def gaussian(shape: tuple[int, ...], correlated: bool = False) -> tuple[Gaussian, np.ndarray]:
    """A Gaussian and its standard deviations."""
    rng = np.random.default_rng(3)
    std, d = rng.uniform(0.2, 1.5, size=shape), math.prod(shape)
    mean = rng.normal(size=shape)
    if not correlated:
        return Gaussian(mean, std**2), std
    mix = np.eye(d) + 0.3 * rng.normal(size=(d, d))
    return Gaussian(mean, mix @ mix.T), std


def mixture() -> Mixture:
    golden = np.load(GOLDEN / "states.npz")
    return Mixture(golden["G1_w"], golden["G1_mu"], list(golden["G1_cov"]))


def equal(a: EMS, b: EMS) -> bool:
    return all(getattr(a, k).tobytes() == getattr(b, k).tobytes() for k in ("lam", "l", "s", "b"))


FAST = {("edm", "edm"), ("vp", "noise"), ("flow", "flow"), ("table", "v")}


@pytest.mark.parametrize(
    ("process", "predicts"),
    [
        pytest.param(p, k, marks=() if (p, k) in FAST else pytest.mark.slow)
        for p in PROCESSES
        for k in fs.predictions
    ],
)
def test_gaussians_have_their_closed_form(process: str, predicts: str):
    path, (model, std) = PROCESSES[process], gaussian((2, 3))
    net, data = denoiser(model, path, predicts), model.sample(10, 1)
    for derivative, exact in (("forward", 3e-15), ("difference", 1e-8)):
        ems = estimate_ems(net, data, levels=5, derivative=derivative, batch=6)
        want = EMS.gaussian(path, std, lam=ems.lam)
        np.testing.assert_allclose(ems.l, want.l, atol=exact)
        np.testing.assert_array_equal(ems.s, ems.l - 1)
        assert ems.info["coefficients with s = l - 1"] == "30 of 30"
        # In (x / alpha, lambda) all of them are one problem, and have the same samples.
        there = {"lam": (-2.5, 3.0), "levels": 5, "batch": 6}
        b = estimate_ems(net, data, derivative=derivative, **there).b
        same = estimate_ems(denoiser(model, fs.EDM(), "data"), data, **there).b
        np.testing.assert_allclose(b, same, atol=100 * exact)


def test_the_offset_converges_with_the_levels():
    """It holds l', which is a difference of fourth order."""
    model, std = gaussian((3,))
    mean, data = model._components.centre.numpy(), model.sample(2, 1)
    errors = []
    for levels in (39, 77):
        ems = estimate_ems(denoiser(model, fs.EDM(), "data"), data, levels=levels, lam=(-2, 3))
        want = EMS.gaussian(fs.EDM(), std, mean, lam=ems.lam).b
        errors.append(np.abs(ems.b - want)[levels // 2].max())
    assert errors[1] < 1e-4
    assert 12 < errors[0] / errors[1] < 20


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 2, 2)])
def test_any_number_of_axes(shape: tuple[int, ...]):
    model, std = gaussian(shape)
    ems = estimate_ems(denoiser(model, fs.VP(), "noise"), model.sample(5, 1), levels=4, batch=2)
    assert ems.size == shape
    np.testing.assert_allclose(ems.l, EMS.gaussian(fs.VP(), std, lam=ems.lam).l, atol=1e-14)


def test_probes_average_to_the_exact_diagonal():
    model, _ = gaussian((2, 3), correlated=True)
    net, data = denoiser(model, fs.VP(), "v"), model.sample(400, 1)
    exact = estimate_ems(net, data[:2], levels=5, probes="exact").l
    y = np.exp(-2 * np.linspace(fs.VP().lam_start, float(fs.VP().lam(1e-3)), 5))
    c = model._components
    V, e = c.basis[0].numpy(), c.variances[0].numpy()
    want = [((V * (r / (e + r))) @ V.T).diagonal().reshape(2, 3) for r in y]
    np.testing.assert_allclose(exact, want, atol=1e-13)
    few, many = (
        np.abs(estimate_ems(net, data, levels=5, probes=k, batch=400).l - exact).max()
        for k in (1, 8)
    )
    assert 0 < many < few < 0.1


@pytest.mark.parametrize("name", ["sd", "vplin"])
def test_official_tables(name: str):
    """Made from 4,096 pairs of other samples: errors of sampling add, and nothing else."""
    golden = np.load(GOLDEN / "statistics.npz")
    want = {k: golden[f"ems/G1_{name}_120/{k}"] for k in ("lam", "l", "s", "b")}
    process, model = fs.VP(), mixture()
    if name == "sd":
        table = fs.DiscreteVP.scaled_linear()
        process = fs.DiscreteVP(table.log_alphas, integer_times=False)
    ends = float(process.lam(process.t_start)), float(process.lam(process.t_end))
    ems = estimate_ems(
        denoiser(model, process, "noise"),
        model.sample(1024, 1),
        lam=np.clip(want["lam"], *ends),
        batch=1024,
        derivative="difference",
        progress=False,
    )
    # b is 0 but for errors of sampling: the mixture has mean 0, and nearly a centre of symmetry.
    for k, rms, largest in (("l", 0.01, 0.04), ("s", 0.06, 0.35), ("b", 0.005, 0.03)):
        off = getattr(ems, k) - want[k]
        assert np.sqrt(np.mean(off**2)) < rms
        assert np.abs(off).max() < largest


def test_forward_mode_and_differences_agree():
    model = mixture()
    net, data = denoiser(model, fs.Flow(), "flow"), model.sample(50, 1)
    a, b = (
        estimate_ems(net, data, levels=7, derivative=d, batch=50) for d in ("forward", "difference")
    )
    for k in ("l", "s", "b"):
        np.testing.assert_allclose(getattr(a, k), getattr(b, k), atol=2e-6)


def test_networks_told_integers():
    """On the integers, by differences between them; not far from the continuous network."""
    model = mixture()
    told = model.denoiser(TABLE, "noise")
    data = model.sample(300, 1)
    with pytest.raises(ValueError, match=r"integer times only.*use derivative = 'difference'"):
        estimate_ems(told, data)
    seen = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        assert t.dtype == torch.int64
        seen.append(int(t[0]))
        return told.network(x, t)

    ems = estimate_ems(
        fs.Denoiser(network, TABLE), data, levels=25, derivative="difference", batch=300
    )
    t = TABLE.time(ems.lam)
    np.testing.assert_allclose(t, np.round(t), atol=1e-6)
    assert 0 <= min(seen) < max(seen) <= 999
    assert np.ptp(np.diff(ems.lam)) > 0
    want = estimate_ems(
        denoiser(model, CONTINUOUS, "noise"), data, lam=ems.lam, derivative="forward", batch=300
    )
    np.testing.assert_allclose(ems.l, want.l, atol=1e-7)
    np.testing.assert_allclose(ems.s, want.s, atol=0.03)
    np.testing.assert_allclose(ems.b, want.b, atol=0.01)


class Elementwise(torch.nn.Module):
    """D of data that are +-1 or +-0.5 (smoothed), coordinate by coordinate."""

    def forward(self, x: Tensor, lam: Tensor) -> Tensor:
        rho2 = torch.exp(-2 * lam).reshape(-1, *(1 for _ in x.shape[1:])) + 0.04
        places = torch.tensor([-1.0, -0.5, 0.5, 1.0], dtype=x.dtype)
        gaps = x[..., None] - places
        r = torch.softmax(-(gaps**2) / (2 * rho2[..., None]), -1)
        return (r * (places + 0.04 / rho2[..., None] * gaps)).sum(-1)

    @staticmethod
    def sample(*shape: int) -> Tensor:
        rng = torch.Generator().manual_seed(4)
        pick = torch.randint(0, 4, shape, generator=rng)
        noise = torch.randn(shape, generator=rng, dtype=torch.float64)
        return torch.tensor([-1.0, -0.5, 0.5, 1.0], dtype=torch.float64)[pick] + 0.2 * noise


def elementwise(process: fs.Process | None = None) -> fs.Denoiser:
    return fs.Denoiser(Elementwise(), process or fs.EDM(), "data", "lambda")


@pytest.mark.parametrize(("reduction", "size"), [("channel", (2, 1, 1)), ("scalar", ())])
def test_shared_coefficients_are_fitted_to_all(reduction: str, size: tuple[int, ...]):
    """Coordinates that are alike are as good as so many samples of one."""
    net, data = elementwise(), Elementwise.sample(600, 2, 4, 3)
    options = {"levels": 12, "lam": (-1.0, 2.0)}
    many = estimate_ems(net, data, reduction=reduction, batch=600, **options)
    assert many.size == size
    one = estimate_ems(net, data.reshape(-1, 1), batch=2**14, **options)
    each = estimate_ems(net, data, batch=600, **options)
    for k, close in (("l", 0.02), ("s", 0.1), ("b", 0.03)):
        values, want = getattr(many, k).reshape(12, -1), getattr(one, k)
        off = np.abs(values - want).max()
        assert off < close
        assert np.abs(getattr(each, k).reshape(12, -1) - want).max() > 1.5 * off


def test_a_batch_is_no_more_than_a_batch():
    net, data = elementwise(), Elementwise.sample(50, 5)
    whole = estimate_ems(net, data, levels=5, batch=50)
    for batch in (7, 64):
        other = estimate_ems(net, data, levels=5, batch=batch)
        for k in ("l", "s", "b"):
            np.testing.assert_allclose(getattr(other, k), getattr(whole, k), atol=1e-11)
    assert equal(estimate_ems(net, lambda i, n: data[i : i + n], count=50, levels=5), whole)
    assert equal(estimate_ems(net, data, count=50, levels=5), whole)
    assert not equal(estimate_ems(net, data, levels=5, seed=1), whole)


def test_conditions_are_those_of_the_samples():
    def network(x: Tensor, t: Tensor, shift: Tensor, of_all: Tensor) -> Tensor:
        assert of_all.shape == (3,)
        return x * torch.tanh(t)[:, None] + shift[:, None] * of_all.sum()

    net = fs.Denoiser(network, fs.Flow(), "data")
    data, shift = Elementwise.sample(10, 2), torch.linspace(-3, 3, 10, dtype=torch.float64)
    cond = {"shift": shift, "of_all": torch.ones(3)}
    runs = [estimate_ems(net, data, levels=3, cond=cond, batch=n) for n in (10, 4)]
    for k in ("l", "s", "b"):
        np.testing.assert_allclose(getattr(runs[0], k), getattr(runs[1], k), atol=1e-11)
    other = {"shift": shift.flip(0), "of_all": torch.ones(3)}
    assert not equal(estimate_ems(net, data, levels=3, cond=other, batch=10), runs[0])


def test_smoothing_averages_the_slope_alone():
    net, data = elementwise(), Elementwise.sample(20, 2)
    sharp, smooth = (estimate_ems(net, data, levels=20, smoothing=k) for k in (0, 5))
    assert sharp.l.tobytes() == smooth.l.tobytes()
    assert np.abs(sharp.s - smooth.s).max() > 1e-3


# The trained network -----------------------------------------------------------------------------


def test_the_trained_network():
    model = fs.models.load("digits")
    data = fs.exact.digits().sample(32, 1, dtype=torch.float32)
    label = {"label": torch.arange(32) % 10}
    plain = estimate_ems(model, data, cond=label, levels=6)
    assert np.abs(plain.l[0] - 1).max() < 0.01
    assert np.abs(plain.l[-1]).max() < 0.05
    assert (np.diff(plain.l.mean((1, 2, 3))) < 0).all()
    guided = estimate_ems(fs.Guided(model, 2.0, {"label": 10}), data, cond=label, levels=6)
    assert np.abs(guided.l - plain.l).max() > 0.02
    none = estimate_ems(fs.Guided(model, 1.0, {"label": 10}), data, cond=label, levels=6)
    assert equal(none, plain)
    assert plain.info["evaluations"] == str(6 * 32)
    assert plain.info["jvps"] == str(2 * 6 * 32)
    assert plain.info["guidance"] == "none" != guided.info["guidance"]


def test_samples_of_the_model_itself(tmp_path: Path):
    model = fs.models.load("digits")
    options = {
        "shape": (1, 8, 8),
        "count": 6,
        "levels": 3,
        "cond": {"label": torch.arange(6)},
        "generate": {"nfe": 5},
        "batch": 4,
    }
    a = estimate_ems(model, **options)
    b = estimate_ems(model, path=tmp_path / "ems", **options)
    assert equal(a, b)
    assert [p.name for p in tmp_path.iterdir()] == ["ems"]
    drawn = torch.cat(
        [
            fs.sample(model, (n, 1, 8, 8), nfe=5, first=i, cond={"label": torch.arange(i, i + n)})
            for i, n in ((0, 4), (4, 2))
        ]
    )
    given = {k: options[k] for k in ("levels", "cond", "batch")}
    assert equal(estimate_ems(model, drawn, **given), a)


def test_half_precision_networks():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 3)
    data = torch.randn(64, 3)
    one = fs.Denoiser(lambda x, t: net(x) * t[:, None], fs.Flow(), "flow")
    half = net.__class__(3, 3, dtype=torch.bfloat16)
    half.load_state_dict(net.state_dict())
    two = fs.Denoiser(
        lambda x, t: half(x) * t[:, None].to(x), fs.Flow(), "flow", dtype=torch.bfloat16
    )
    a, b = (estimate_ems(m, data, levels=4, lam=(-3, 3)) for m in (one, two))
    np.testing.assert_allclose(a.l, b.l, atol=0.02)


# Interruption ------------------------------------------------------------------------------------


class Stops:
    """A network that is interrupted at a call."""

    def __init__(self, at: float = math.inf) -> None:
        self.inner, self.at, self.calls = Elementwise(), at, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self.at:
            raise KeyboardInterrupt
        return self.inner(x, t)


def stopping(at: float = math.inf) -> tuple[Stops, fs.Denoiser]:
    network = Stops(at)
    return network, fs.Denoiser(network, fs.EDM(), "data", "lambda")


def test_interrupted_and_resumed_is_the_same(tmp_path: Path):
    data = Elementwise.sample(20, 3)
    options = {"levels": 4, "batch": 6}  # 4 batches a level
    network, model = stopping()
    whole = estimate_ems(model, data, **options)
    total = network.calls
    for at in (0, 13, 20, 31, total - 1):
        path = tmp_path / f"{at}"
        network, model = stopping(at)
        with pytest.raises(KeyboardInterrupt):
            estimate_ems(model, data, path=path, **options)
        if at:
            assert path.exists()
        network, model = stopping()
        assert equal(estimate_ems(model, data, path=path, **options), whole)
        assert network.calls < total or at < 20
        network, model = stopping()
        assert equal(estimate_ems(model, data, path=path, **options), whole)
        assert network.calls <= 12  # no more than the check
    assert len(list(tmp_path.iterdir())) == 5


def test_other_jobs_are_refused(tmp_path: Path):
    path, data = tmp_path / "ems", Elementwise.sample(8, 3)
    base = {"levels": 4, "path": path}
    estimate_ems(elementwise(), data, **base)
    other = fs.Denoiser(lambda x, t: 1.1 * Elementwise()(x, t), fs.EDM(), "data", "lambda")
    plain = fs.Denoiser(Elementwise().forward, fs.EDM(), "data", "lambda")
    cases: list[tuple[fs.Model, Tensor, dict, str]] = [
        (elementwise(), data, {"seed": 1}, r"seed: 0 there, 1 here"),
        (elementwise(), data, {"levels": 5}, "levels"),
        (elementwise(), data, {"probes": 2}, "probes"),
        (elementwise(), data, {"derivative": "difference"}, "derivative"),
        (elementwise(), data + 1, {}, "data"),
        (elementwise(), data[:4], {}, "samples|data"),
        (elementwise(), data, {"cond": {"a": 1}}, "cond"),
        (elementwise(fs.EDM(0.003)), data, {}, "process|levels"),
        (other, data, {}, "weights|another network"),
    ]
    for model, samples, change, word in cases:
        with pytest.raises(ValueError, match=f"ems.*belongs to another.*({word})"):
            estimate_ems(model, samples, **{**base, **change})
    estimate_ems(plain, data, levels=4, path=tmp_path / "answers")
    with pytest.raises(ValueError, match="another network"):
        estimate_ems(other, data, levels=4, path=tmp_path / "answers")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="readable"):
        estimate_ems(elementwise(), data, **base)
    EMS.gaussian(fs.VP(), 1.0).save(path)
    with pytest.raises(ValueError, match="another kind"):
        estimate_ems(elementwise(), data, **base)
    with pytest.raises(FileNotFoundError, match="folder"):
        estimate_ems(elementwise(), data, path=tmp_path / "no" / "ems")


def script(tmp_path: Path, delay: float, path: Path | None) -> Path:
    file = tmp_path / "job.py"
    file.write_text(f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads(1)
if "RANK" in __import__("os").environ:
    torch.distributed.init_process_group("gloo")
import fewstep as fs
from test_statistics import Elementwise, estimate_ems
inner = Elementwise()
def network(x, t):
    time.sleep({delay})
    return inner(x, t)
model = fs.Denoiser(network, fs.EDM(), "data", "lambda")
ems = estimate_ems(model, Elementwise.sample(20, 3), levels=7, batch=6, progress=False,
                   path={None if path is None else str(path)!r})
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
ems.save(sys.argv[1] + str(rank))
""")
    return file


def alone() -> EMS:
    return estimate_ems(elementwise(), Elementwise.sample(20, 3), levels=7, batch=6)


@pytest.mark.slow
def test_killed_and_restarted_is_the_same(tmp_path: Path):
    part = tmp_path / "part"
    job = [sys.executable, str(script(tmp_path, 0.02, part)), str(tmp_path / "out")]
    for _ in range(2):
        process = subprocess.Popen(job)
        before = part.stat().st_mtime_ns if part.exists() else 0
        while not part.exists() or part.stat().st_mtime_ns == before:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.7)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(job, check=True)
    assert equal(EMS.load(tmp_path / "out0"), alone())


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_makes_the_same_sums(tmp_path: Path, world: int):
    part = tmp_path / "part"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

    def run(processes: int, delay: float, path: Path | None) -> list[str]:
        file = script(tmp_path, delay, path)
        return [*torchrun, f"--nproc-per-node={processes}", str(file), str(tmp_path / "out")]

    subprocess.run(run(world, 0, None), check=True, capture_output=True)
    for rank in range(world):
        assert equal(EMS.load(tmp_path / f"out{rank}"), alone())
    # Interrupted with so many, finished by one.
    process = subprocess.Popen(run(world, 0.05, part), start_new_session=True)
    while not (tmp_path / "part.rank1").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(1.0)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(
        [sys.executable, str(script(tmp_path, 0, part)), str(tmp_path / "one")], check=True
    )
    assert equal(EMS.load(tmp_path / "one0"), alone())
    assert not (tmp_path / "part.rank1").exists()


# Memory ------------------------------------------------------------------------------------------


MEMORY = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
import fewstep as fs
from fewstep._calibrate._statistics import estimate_ems
d, batch, levels = 2**15, 64, 2
noise = torch.randn(batch, d)
model = fs.Denoiser(lambda x, t: x.mul(t[:, None]), fs.Flow(), "flow")
def kib(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])
for count in (2, 64, 1024):
    before = kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    estimate_ems(model, lambda i, n: noise[:n], count=count, levels=levels, batch=batch,
                 lam=(-2, 2), progress=False)
    print((kib("VmHWM") - before) * 1024, 4 * d * batch, 3 * 8 * levels * d)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_memory_does_not_depend_on_the_number_of_samples():
    """The table and some copies of the state of a batch, for 64 samples and for 1,024. The network
    here keeps an output, a tangent and two products: what is beyond is ours."""
    mapped = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        env={**os.environ, **mapped},
        check=True,
        capture_output=True,
        text=True,
    )
    _, few, many = (list(map(int, line.split())) for line in done.stdout.splitlines())
    state, table = few[1:]
    assert abs(many[0] - few[0]) < state / 4
    assert many[0] < table + (6 + 4) * state


# Refusals ----------------------------------------------------------------------------------------


def never(x: Tensor, t: Tensor) -> Tensor:
    raise AssertionError("the network was called")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model": never}, "model = "),
        ({"model": fs.Guided(elementwise(), [1.0, 2.0], {"a": 0})}, "one per sample"),
        ({"data": torch.zeros(4, 3, dtype=torch.int64)}, "floating-point"),
        ({"data": torch.full((4, 3), math.nan)}, "nan or infinity"),
        ({"data": torch.zeros(1, 3)}, "data has 1 samples"),
        ({"data": "digits"}, "data = 'digits'"),
        ({"data": lambda first, count: torch.zeros(count, 3)}, "count is missing"),
        ({"data": lambda first, count: 3, "count": 4}, "data: "),
        ({"data": None, "count": 4}, "shape is missing"),
        ({"data": None, "count": 4, "shape": (0,)}, "shape = "),
        ({"data": None, "count": 4, "shape": (3,), "generate": {"first": 1}}, "'first'"),
        ({"generate": {"nfe": 3}}, "generate"),
        ({"shape": (4,)}, "shape = "),
        ({"count": 1}, "count = 1"),
        ({"count": 5}, "count = 5"),
        ({"levels": 1}, "count = 1|levels"),
        ({"lam": (0.0, 100.0)}, "the network knows"),
        ({"lam": (1.0, 0.0)}, "lam = "),
        ({"probes": 0}, 'probes = 0.*or "exact"'),
        ({"reduction": "chanel"}, "did you mean 'channel'"),
        ({"reduction": "channel"}, "axes"),
        ({"derivative": "backward"}, "derivative = 'backward'"),
        ({"smoothing": -1}, "smoothing = -1"),
        ({"batch": 0}, "batch = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"cond": [1]}, "cond = "),
        ({"group": 3}, "group = 3"),
    ],
)
def test_bad_input_is_refused_before_the_network_is_called(change: dict, word: str):
    good = {"model": fs.Denoiser(never, fs.EDM()), "data": torch.zeros(4, 3)}
    with pytest.raises(ValueError, match=word):
        estimate_ems(**{**good, **change})


def detached(x: Tensor, t: Tensor) -> Tensor:
    return Elementwise()(x, t.detach())


def no_forward(x: Tensor, t: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() * np.exp(-t.numpy())[:, None])


@pytest.mark.parametrize("network", [detached, no_forward])
def test_networks_without_forward_mode_are_told_what_to_do(network: Callable[..., Tensor]):
    """Also where it silently gives another answer."""
    model = fs.Denoiser(network, fs.EDM(), "data", "lambda")
    data, options = Elementwise.sample(20, 3), {"levels": 9, "lam": (-1.0, 2.0)}
    with pytest.raises(ValueError, match="use derivative = 'difference'"):
        estimate_ems(model, data, **options)
    ems = estimate_ems(model, data, derivative="difference", **options)
    assert "difference, step" in ems.info["derivative"]
    if network is detached:
        want = estimate_ems(elementwise(), data, **options)
        np.testing.assert_allclose(ems.s, want.s, atol=1e-4)


def test_what_is_not_finite_is_found():
    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t[:, None] > 3, math.nan, 1.0) * x

    model = fs.Denoiser(network, fs.EDM(), "data", "lambda")
    with pytest.raises(FloatingPointError, match=r"NaN or inf at t = .*samples 0 to"):
        estimate_ems(model, torch.randn(8, 3), levels=4, derivative="difference")
    with pytest.raises(ValueError, match="shape"):
        estimate_ems(fs.Denoiser(lambda x, t: x[:1], fs.EDM()), torch.randn(8, 3), levels=4)
