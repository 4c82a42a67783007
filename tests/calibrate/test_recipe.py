"""Recipes: the file, what it refuses, and what forcing does."""

from __future__ import annotations

import functools
import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fewstep as fs
from fewstep._calibrate._ems import EMS
from fewstep._calibrate._fingerprint import differs, fingerprint, guidance_of
from fewstep._calibrate._recipe import Candidate, Recipe, moved

SHAPE = (3, 4, 4)


class Net(nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.inner = nn.Conv2d(3, 16, 3, padding=1)
            self.outer = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x, t, label=None):
        shift = 0 if label is None else label.to(x.dtype).reshape(-1, 1, 1, 1)
        return self.outer(torch.tanh(self.inner(x) + shift))


def denoiser(seed=0, process=None, predicts="noise", network=None):
    network = Net(seed) if network is None else network
    return fs.Denoiser(network, fs.VP() if process is None else process, predicts)


def line(nfe, name="ddim on lambda", kind="solver", median=0.1, chosen=False):
    return Candidate(
        nfe, name, kind, median, median / 2, 2 * median, median, median, median, 7, 1.5, chosen
    )


def recipe(model, statistics=False):
    plans = {n: fs.plan("dpmpp_2m", model, n) for n in (4, 6)}
    ems = EMS.gaussian(model.process, 0.5, count=8) if statistics else None
    lines = [line(n, "x", "learned", 0.01, True) for n in plans] + [line(n) for n in plans]
    known = fingerprint(model, SHAPE, {}, 1)
    return Recipe(
        plans,
        tuple(lines),
        repr(model.process),
        model.prediction.name,
        guidance_of(model),
        SHAPE,
        known,
        ems,
        {"network": "Net", "skipped": []},
    )


def test_a_recipe_survives_its_file(tmp_path):
    model = denoiser()
    made = recipe(model, statistics=True)
    made.save(tmp_path / "r.safetensors")
    read = Recipe.load(tmp_path / "r.safetensors")
    assert (read.nfes, read.plans, str(read)) == ((4, 6), made.plans, str(made))
    assert (read.candidates, read.guidance) == (made.candidates, made.guidance)
    assert read.statistics is not None
    assert np.array_equal(read.statistics.l, EMS.gaussian(model.process, 0.5, count=8).l)
    assert read.to_bytes() == made.to_bytes()


def test_sample_takes_a_recipe():
    model = denoiser()
    made = recipe(model)
    x = fs.sample(model, (2, *SHAPE), solver=made, nfe=6, progress=False)
    assert torch.equal(x, fs.sample(model, (2, *SHAPE), solver="dpmpp_2m", nfe=6, progress=False))
    with pytest.raises(ValueError, match=r"nfe = 5; this recipe has plans for 4, 6"):
        fs.sample(model, (2, *SHAPE), solver=made, nfe=5)
    with pytest.raises(ValueError, match="nfe = None"):
        fs.sample(model, (2, *SHAPE), solver=made)
    one = replace(made, plans={4: made.plans[4]})
    assert fs.sample(model, (1, *SHAPE), solver=one, progress=False).shape == (1, *SHAPE)


def test_another_guidance_is_refused_unless_forced():
    model = denoiser()
    made = recipe(fs.Guided(model, 2.0, {"label": 0}))
    for other, said in (
        (model, "no guidance, where the recipe is for guidance scale 2.0"),
        (fs.Guided(model, 4.0, {"label": 0}), "guidance scale 4.0, where"),
        (fs.Guided(model, 2.0, {"label": 0}, rescale=0.5), "with rescale 0.5, where"),
        (fs.Guided(model, 2.0, {"label": 0}, interval=(0.1, 5.0)), "for rho in"),
    ):
        with pytest.raises(ValueError, match="made for another model") as caught:
            made.plan_for(other, 4)
        assert said in str(caught.value)
        with pytest.warns(UserWarning, match="do not hold here"):
            assert made.force().plan_for(other, 4) == made.plans[4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.plan_for(fs.Guided(model, 2.0, {"label": 1}), 4)
        recipe(model).plan_for(fs.Guided(model, 1.0, {"label": 0}), 4)  # scale 1 is none


def test_another_network_is_refused_a_half_precision_copy_is_not():
    model = denoiser()
    made = recipe(model)
    with pytest.raises(ValueError, match="another network: its parameters differ by"):
        made.plan_for(denoiser(1), 4)
    with pytest.raises(ValueError, match="parameters, not"):
        made.plan_for(denoiser(network=nn.Conv2d(3, 3, 1)), 4)
    with pytest.raises(ValueError, match="no parameters to compare"):
        made.plan_for(denoiser(network=lambda x, t: x), 4)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        made.plan_for(denoiser(network=Net(0).to(dtype)), 4)
    slightly = Net(0)
    with torch.no_grad():
        for p in slightly.parameters():
            p.mul_(1 + 0.02 * torch.randn_like(p))
    with pytest.raises(ValueError, match="another network"):
        made.plan_for(denoiser(network=slightly), 4)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("wrap", ["closure", "partial", "method", "object", "compiled"])
def test_the_network_is_found_in_what_users_wrap_it_in(wrap):
    class Pipe:
        def __init__(self, net):
            self.net = net

        def call(self, x, t):
            return self.net(x, t)

        def __call__(self, x, t):
            return self.net(x, t)

    def wrapped(net):
        return {
            "closure": lambda: lambda x, t: net(x, t),
            "partial": lambda: functools.partial(net, label=None),
            "method": lambda: Pipe(net).call,
            "object": lambda: Pipe(net),
            "compiled": lambda: torch.compile(net),
        }[wrap]()

    known = fingerprint(denoiser(), SHAPE, {}, 1)
    assert known["kind"] == "parameters"
    assert differs(known, denoiser(network=wrapped(Net(0))), SHAPE) == ""
    assert "differ" in differs(known, denoiser(network=wrapped(Net(1))), SHAPE)


def test_a_network_without_parameters_is_known_by_its_answers(tmp_path):
    model = fs.exact.digits().denoiser(fs.EDM())
    shape = (1, 8, 8)
    cond = {"label": torch.arange(4)}
    known = fingerprint(model, shape, cond, 4)
    assert known["kind"] == "answers"
    made = replace(recipe(denoiser()), known=known, shape=shape)
    made.save(tmp_path / "r")
    known = Recipe.load(tmp_path / "r").known
    assert differs(known, model, shape) == ""
    other = fs.exact.digits().denoiser(fs.EDM(), "noise")
    assert differs(known, other, shape) == ""  # the same data prediction
    off = fs.Denoiser(lambda x, t, label: 1.1 * model.network(x, t, label=label), fs.EDM(), "data")
    assert "answers differ" in differs(known, off, shape)


def test_another_process_is_refused_and_forced_to_the_same_lambda():
    model = denoiser()
    made = recipe(model)
    other = denoiser(process=fs.VP(beta_max=18.0))
    with pytest.raises(ValueError, match="where the recipe is for VP"):
        made.plan_for(other, 4)
    flow = fs.Denoiser(model.network, fs.Flow(t_start=0.999, t_end=1e-4), "flow")
    with pytest.warns(UserWarning, match="another model"):
        run = made.force().plan_for(flow, 4)
    fs.sample(flow, (1, *SHAPE), solver=run, progress=False)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_3m", "unipc_2", "v_ab3"])
def test_moved_to_the_same_process_is_the_same_plan_and_elsewhere_the_same_sampler(name):
    exact = fs.exact.digits()
    process = fs.VP()
    run = fs.plan(name, exact.denoiser(process), 5, grid="lambda")
    again = moved(run, exact.denoiser(process))
    for mine, theirs in zip(again.levels, run.levels, strict=True):
        assert mine.alpha == pytest.approx(theirs.alpha, rel=1e-12)
        assert mine.sigma == pytest.approx(theirs.sigma, rel=1e-12)
    # EDM knows fewer levels of noise than VP; a custom flow is wide enough.
    flow = exact.denoiser(fs.Flow(t_start=0.999, t_end=1e-4))
    there = moved(run, flow)
    x = fs.start_noise((4, 1, 8, 8), 0, dtype=torch.float64)
    size = [math.hypot(p.levels[0].alpha, p.levels[0].sigma) for p in (run, there)]
    a = fs.sample(exact.denoiser(process), solver=run, x=x * size[0], progress=False)
    b = fs.sample(flow, solver=there, x=x * size[1], progress=False)
    assert torch.allclose(a, b, atol=1e-9)
    with pytest.raises(ValueError, match="knows lambda from"):
        moved(fs.plan(name, fs.VP(), 5), exact.denoiser(fs.EDM(sigma_max=10.0)))


def test_bad_files_are_refused(tmp_path):
    model = denoiser()
    path = tmp_path / "r.safetensors"
    recipe(model).save(path)
    content = path.read_bytes()
    with pytest.raises(FileNotFoundError, match="no such file"):
        Recipe.load(tmp_path / "none")
    for cut in (0, 7, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            Recipe.load(path)
    path.write_bytes(b"PK\x03\x04 a zip archive, as torch.save writes")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        Recipe.load(path)
    fs.plan("ddim", model, 4).save(path)
    with pytest.raises(ValueError, match=r"another kind \(format 'fewstep.plan"):
        Recipe.load(path)
    size = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + size])
    head["__metadata__"]["recipe"] = "{}"
    text = json.dumps(head).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    with pytest.raises(ValueError, match="says it is a recipe but lacks"):
        Recipe.load(path)


def test_the_report_says_when_nothing_helps():
    model = denoiser()
    made = recipe(model)
    assert "NFE 4: learned, median error 10 times smaller than that of ddim on lambda" in str(made)
    kept = [replace(c, chosen=c.kind == "solver") for c in made.candidates]
    text = str(replace(made, candidates=tuple(kept)))
    assert "NFE 4: no calibrated plan is better than ddim on lambda, which is kept" in text
