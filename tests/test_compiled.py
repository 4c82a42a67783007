from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import fewstep as fs
from fewstep._compiled import _program, compiled

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


class Network(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.dtype = dtype

    def forward(self, x, t, shift=0.0):
        wave = torch.cos(t.float() / 100).reshape(-1, 1, 1, 1)
        return torch.tanh(self.conv(x) + wave + shift).to(self.dtype)


def model(predicts="noise", process=None, dtype=torch.float32):
    return fs.Denoiser(Network(dtype), process or fs.VP(), predicts)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compare(run, m, solver, nfe, x, **cond):
    plan = fs.plan(solver, m, nfe)
    got = run(plan, x, cond)
    want = fs.sample(m, solver=plan, x=x, cond=cond, progress=False)
    torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5 * float(want.abs().max()))


@pytest.mark.parametrize("predicts", ["noise", "data", "flow"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "dpmpp_3m", "unipc_2", "deis_tab1"])
def test_compiles_once_for_any_number_of_steps(solver, predicts):
    m = model(predicts, fs.Flow() if predicts == "flow" else None)
    run = compiled(m, backend="eager")
    for nfe in (5, 8, 20):
        compare(run, m, solver, nfe, torch.randn(2, 3, 8, 8))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc_2"])
def test_with_the_default_compiler(solver):
    m = model()
    run = compiled(m)
    for nfe in (5, 8):
        compare(run, m, solver, nfe, torch.randn(2, 3, 8, 8))
    assert counters["stats"]["unique_graphs"] == 1


def test_every_solver_equals_the_loop():
    m, x = model(), torch.randn(1, 3, 6, 6)
    run = compiled(m, backend="eager")
    with torch.compiler.set_stance("force_eager"):  # the program is checked, not the compiler
        for solver in fs.solvers:
            compare(run, m, solver, 7, x)


def test_windows_are_the_shortest():
    """What a step reads: x, the output, and what a row cannot do without."""
    for solver, predicts, states, values in (
        ("ddim", "noise", 1, 1),
        ("dpmpp_2m", "noise", 1, 2),
        ("dpmpp_2m", "data", 1, 2),
        ("dpmpp_3m", "noise", 1, 3),
        ("deis_tab1", "noise", 1, 2),
        ("deis_tab2", "noise", 1, 3),
        ("unipc_2", "noise", 1, 3),
    ):
        program = _program(fs.plan(solver, fs.VP(), 8, predicts=predicts))
        assert (program.states, program.values) == (states, values), solver


@pytest.mark.parametrize("process", [fs.EDM(), fs.DiscreteVP.linear()], ids=["scaled", "integers"])
def test_input_scaling_and_integer_times(process):
    m = model("noise", process)
    run = compiled(m, backend="eager")
    for nfe in (5, 8):
        compare(
            run, m, "dpmpp_2m", nfe, process.prior_std(process.t_start) * torch.randn(2, 3, 8, 8)
        )
    assert counters["stats"]["unique_graphs"] == 1


def test_types_and_conditions():
    x = torch.randn(2, 3, 8, 8)
    half = model(dtype=torch.bfloat16)
    compare(compiled(half, backend="eager"), half, "dpmpp_2m", 6, x, shift=torch.tensor(0.5))
    m = model()
    m.network.double()
    got = compiled(m, backend="eager")(fs.plan("dpmpp_2m", m, 6), x.double())
    assert got.dtype == torch.float64


@pytest.mark.parametrize("interval", [(0.0, float("inf")), (0.2, 5.0)], ids=["always", "interval"])
def test_guidance(interval):
    m = fs.Guided(model(), 3.0, {"shift": torch.zeros(1, 1, 1)}, interval)
    run = compiled(m, backend="eager")
    x, shift = torch.randn(2, 3, 8, 8), torch.tensor([0.5, -0.5]).reshape(2, 1, 1, 1)
    for nfe in (5, 8, 20):
        compare(run, m, "dpmpp_2m", nfe, x, shift=shift)
    assert counters["stats"]["unique_graphs"] == (1 if interval[0] == 0 else 2)


def test_refuses_in_a_sentence():
    with pytest.raises(ValueError, match="wrap your network"):
        compiled(Network())  # type: ignore
    broken = fs.Denoiser(lambda x, t: x / 0, fs.VP())
    with pytest.raises(FloatingPointError, match=r"fewstep\.sample"):
        compiled(broken, backend="eager")(fs.plan("ddim", broken, 2), torch.randn(1, 3))
