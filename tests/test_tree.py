"""Trees of states: several tensors at noise levels of their own, one network call for all."""

from __future__ import annotations

import hashlib
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fewstep as fs
from fewstep._noise import Noise
from fewstep._plan import Plan, State
from fewstep._tree import TreeState, tree

SOLVERS = list(fs.solvers)


def joint(x: Any, t: Any) -> dict[str, torch.Tensor]:
    """Video (batch, frames, height, width) and audio (batch, samples) that hear each other."""
    video, audio = x["video"], x["audio"]
    sound = audio.mean(1)[:, None, None, None]
    light = video.mean((1, 2, 3))[:, None]
    return {
        "video": torch.tanh(0.7 * video - 0.3 * t["video"][:, None, None, None] + 0.2 * sound),
        "audio": torch.tanh(0.9 * audio - 0.2 * t["audio"][:, None] + 0.1 * light),
    }


def two(solver: str, nfe: int = 5) -> dict[str, Plan]:
    shifts = {"video": 12.0, "audio": 3.0}
    return {
        name: fs.plan(solver, fs.Flow(shift=shift), nfe, grid="uniform", predicts="flow")
        for name, shift in shifts.items()
    }


X = {"video": torch.randn(2, 3, 4, 5), "audio": torch.randn(2, 6)}


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_leaf_is_its_own_run(solver):
    """With the joint network's answers, bit for bit; saved and loaded on the way."""
    run = tree(two(solver))
    alone = {k: run.plans[k].start(X[k], noise=run.noise(5)[k]) for k in X}
    state, calls = run.start(X, noise=5), 0
    while not state.done:
        x_in, t_in = state.query()
        for k in X:
            mine, told = alone[k].query()
            assert torch.equal(x_in[k], mine)
            assert torch.equal(t_in[k], told)
        assert not torch.equal(t_in["video"], t_in["audio"]) or t_in["video"][0] == 1
        out = joint(x_in, t_in)
        alone = {k: alone[k].advance(out[k]) for k in X}
        state, calls = state.advance(out), calls + 1
        assert state == TreeState(alone)
        assert state.nfe == calls
    assert calls == run.nfe == 5
    assert all(torch.equal(state.x[k], alone[k].x) for k in X)


@pytest.mark.parametrize("solver", ["dpmpp_3m", "unipc_3", "sa_solver"])
def test_saved_loaded_and_pickled(solver, tmp_path):
    plans = two(solver, 4)
    run = tree([plans["video"], {"a": plans["audio"], "b": (plans["audio"],)}])
    x = [X["video"], {"a": X["audio"], "b": (2 * X["audio"],)}]

    def network(x: Any, t: Any) -> Any:
        a, b = (torch.tanh(v) for v in (x[1]["a"], x[1]["b"][0]))
        return [torch.tanh(x[0]) * 0.5, {"a": a + 0.1 * b, "b": (b - 0.1 * a,)}]

    state = other = run.start(x, noise=3)
    while not state.done:
        other.save(tmp_path / "tree")
        other = pickle.loads(pickle.dumps(TreeState.load(tmp_path / "tree")))
        assert other == state
        assert type(other.states[1]["b"]) is tuple
        state, other = (s.advance(network(*s.query())) for s in (state, other))
        assert other == state
    assert state != run.start(x, noise=3)
    assert [p.name for p in tmp_path.iterdir()] == ["tree"]
    assert pickle.loads(pickle.dumps(run)) == run


def test_leaves_have_noise_of_their_own():
    run = tree(two("ddpm"))
    noises = run.noise(7)
    for name, noise in noises.items():
        digest = hashlib.sha256(f"7/{name}".encode()).digest()
        assert noise == Noise(int.from_bytes(digest[:8], "little"))
    a, b = (noise.start((3, 1000)) for noise in noises.values())
    assert abs(torch.corrcoef(torch.stack([a.ravel(), b.ravel()]))[0, 1]) < 0.06
    # by samples, and with a path
    many = run.noise(Noise((7, 8), path=True))
    assert many["audio"].path
    assert many["audio"].seed[0] == noises["audio"].seed
    assert torch.equal(many["audio"].start((2, 9))[0], noises["audio"].start((1, 9))[0])
    # whoever gives a tree of sources says it all
    same = run.start(X, noise={"video": 1, "audio": Noise(1)})
    assert {k: state.noise for k, state in same.states.items()} == dict.fromkeys(X, Noise(1))
    own = run.start(X, noise=7)
    assert {k: state.noise for k, state in own.states.items()} == noises


def test_hooks():
    run = tree(two("dpmpp_2m"))
    out = joint(*run.start(X).query())
    alone = {k: run.plans[k].start(X[k]) for k in X}
    both = run.start(X).advance(out, fs.clip(0.1))
    assert both == TreeState({k: alone[k].advance(out[k], fs.clip(0.1)) for k in X})
    one = run.start(X).advance(out, {"video": fs.clip(0.1), "audio": None})
    assert one.states["video"] == both.states["video"]
    assert one.states["audio"] == alone["audio"].advance(out["audio"])


def test_a_shift_multiplies_rho_exactly():
    """sigma / alpha of shift k is k times that of shift 1. So a stream of shift k2 whose data are
    multiplied by k1 / k2 follows the schedule of shift k1: x / alpha is multiplied by k1 / k2."""
    u = np.linspace(0.001, 0.999, 201)
    for k in (0.5, 3.0, 12.0):
        process = fs.Flow(shift=k)
        rho, shifted = process.level(u).rho, process.level(process.warp(u)).rho
        np.testing.assert_allclose(shifted, k * rho, rtol=1e-11)  # 1 - t cancels
    u = np.array([0.98, 0.9, 0.7, 0.45, 0.2, 0.05])
    c, scaled = 12 / 3, {"audio": 3.0, "as video": 12.0}
    for solver in ("ddim", "dpmpp_3m", "unipc_2", "ddpm"):
        plans = {
            name: fs.plan(
                solver, fs.Flow(), grid=list(fs.Flow(shift=shift).warp(u)), predicts="data"
            )
            for name, shift in scaled.items()
        }
        run = tree(plans)
        x = torch.randn(2, 5, dtype=torch.float64)
        first = {name: plan.levels[0] for name, plan in plans.items()}
        ratio = c * first["as video"].alpha / first["audio"].alpha
        state = run.start({"audio": x, "as video": ratio * x}, noise={"audio": 1, "as video": 1})
        while not state.done:
            assert state.level["as video"].rho == pytest.approx(c * state.level["audio"].rho)
            data = {k: v.x / state.level[k].alpha for k, v in state.states.items()}
            torch.testing.assert_close(data["as video"], c * data["audio"], rtol=1e-9, atol=1e-9)
            answer = torch.tanh(data["audio"])
            state = state.advance({"audio": answer, "as video": c * answer})
        end = {k: v.x / v.level.alpha for k, v in state.states.items()}
        torch.testing.assert_close(end["as video"], c * end["audio"], rtol=1e-9, atol=1e-9)


def plan_of(nfe: int) -> Plan:
    return fs.plan("ddim", fs.VP(), nfe)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tree({}), "need at least one plan"),
        (lambda: tree({"a": 3}), "/a is int; need a plan"),
        (lambda: tree({1: plan_of(2)}), "need strings"),
        (lambda: tree({"a/b": plan_of(2)}), "need strings without '/'"),
        (
            lambda: tree({"a": plan_of(2), "b": [plan_of(3)]}),
            "/a makes 2 network evaluations and /b/0 3",
        ),
        (lambda: tree([plan_of(2)]).start(X), "x: the tree has video, audio; need 0"),
        (lambda: tree(two("ddim")).start({"video": X["video"]}), "x: the tree has video; need"),
        (lambda: tree(two("ddim")).start(X["video"]), "x: the tree has Tensor; need video"),
        (
            lambda: tree(two("ddpm")).start(X, noise=lambda draw, like: like),
            "noise: the tree has function; need video, audio",
        ),
        (lambda: tree(two("ddpm")).noise("zero"), "noise = 'zero'"),
        (
            lambda: tree(two("ddim")).start(X).advance([X["video"], X["audio"]]),
            "output: the tree has 0, 1; need video, audio",
        ),
        (
            lambda: tree(two("ddim")).start(X).advance({**X, "audio": X["video"]}),
            "network returned shape",
        ),
    ],
)
def test_mistakes(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_bad_files(tmp_path):
    path = tmp_path / "tree"
    tree(two("ddim")).start(X).save(path)
    raw = path.read_bytes()
    for cut in (0, 100, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:cut])
        with pytest.raises(ValueError, match="truncated"):
            TreeState.load(path)
    State.save(tree(two("ddim")).start(X).states["audio"], path)
    with pytest.raises(ValueError, match="of another kind"):
        TreeState.load(path)
    meta = {"format": "fewstep.tree.1", "tree": '["dict", {"a": 0}]'}
    save_file({"other": torch.zeros(3)}, path, metadata=meta)
    with pytest.raises(ValueError, match=r"lacks or garbles 'leaf\.0'"):
        TreeState.load(path)
