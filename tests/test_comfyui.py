"""The ComfyUI nodes, in a stub host: every node, every solver, all kinds of model."""

from __future__ import annotations

import builtins
import json
import math
import re
from pathlib import Path

import pytest
import torch

import comfy_host as host
import fewstep as fs
from fewstep import k_diffusion as K

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (2, 4, 3, 5)
FLOWS = ("sd3", "flux")


@pytest.fixture
def comfy(monkeypatch, tmp_path):
    monkeypatch.delenv("FEWSTEP_KSAMPLER", raising=False)
    return host.install(monkeypatch, tmp_path)


@pytest.fixture
def pack(comfy, monkeypatch):
    return host.load(monkeypatch)


@pytest.fixture
def nodes(pack):
    return pack.NODE_CLASS_MAPPINGS


def noise(seed=0):
    return fs.start_noise(SHAPE, seed)


def made(node, *values, **named):
    """The outputs of a node, called as ComfyUI does: by the name in FUNCTION."""
    out = getattr(node(), node.FUNCTION)(*values, **named)
    assert len(out) == len(node.RETURN_TYPES)
    for value, kind in zip(out, node.RETURN_TYPES, strict=True):
        if kind == "SAMPLER":
            assert isinstance(value, host.KSAMPLER)
        else:
            assert (value.dtype, value.ndim, value.device.type) == (torch.float32, 1, "cpu")
    return out


def test_the_pack(pack):
    assert pack.NODE_CLASS_MAPPINGS.keys() == pack.NODE_DISPLAY_NAME_MAPPINGS.keys()
    text = (ROOT / "docs" / "comfyui.md").read_text()
    for key, node in pack.NODE_CLASS_MAPPINGS.items():
        assert pack.NODE_DISPLAY_NAME_MAPPINGS[key] in text
        assert node.CATEGORY.startswith("sampling/custom_sampling")
        assert node.DESCRIPTION
        assert callable(getattr(node, node.FUNCTION))
        for name, (kind, *more) in node.INPUT_TYPES()["required"].items():
            assert name.isidentifier()
            assert kind in ("MODEL", "INT", "FLOAT") or isinstance(kind, list)
            if isinstance(kind, list) and more:
                assert more[0]["default"] in kind
            json.dumps([kind, *more])  # it goes to the browser
    options = pack.NODE_CLASS_MAPPINGS["FewstepSampler"].INPUT_TYPES()["required"]["solver"][0]
    assert options == list(fs.solvers)
    assert not hasattr(pack, "WEB_DIRECTORY")


@pytest.mark.parametrize("name", list(fs.solvers))
@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_every_solver(nodes, name, kind):
    """The result is that of fewstep on the model's own process, and every step is shown once."""
    patcher, shown = host.ModelPatcher(kind), []
    (sigmas,) = made(nodes["FewstepSigmas"], patcher, 6, "softened", 1.0)
    (sampler,) = made(nodes["FewstepSampler"], name)
    assert sampler.sampler_function.__name__ == f"sample_{name}"
    out = host.sample(
        patcher, sampler, sigmas, noise(), callback=lambda *said: shown.append(said), seed=11
    )
    assert [(i, n) for i, _, _, n in shown] == [(i, 6) for i in range(6)]
    high, low = sigmas[0], float(patcher.model.model_sampling.sigma_min)
    if kind == "sd":
        process, x = fs.EDM(low, float(high)), noise() * torch.sqrt(1 + high**2)
    else:
        process, x = fs.Flow(t_end=low), noise()
    plan = fs.plan(name, process, grid=[float(s) for s in sigmas])
    assert len(patcher.model.asked) == plan.nfe
    denoiser = fs.Denoiser(patcher.model.denoised, process, "data")
    wanted = fs.sample(denoiser, solver=plan, x=x, seed=11, progress=False)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def run(nodes, patcher, solver, steps, z):
    (sigmas,) = made(nodes["FewstepSigmas"], patcher, steps, "softened", 1.0)
    (sampler,) = made(nodes["FewstepSampler"], solver)
    return host.sample(patcher, sampler, sigmas, z), sigmas


@pytest.mark.parametrize("kind", list(host.MODELS))
def test_it_goes_where_the_ode_goes(nodes, kind):
    patcher, error = host.ModelPatcher(kind), []
    for steps in (20, 80):
        out, sigmas = run(nodes, patcher, "dpmpp_2m", steps, noise())
        sampling = patcher.get_model_object("model_sampling")
        wanted = host.end(sampling, float(sigmas[0]), noise())
        error.append(float((out - wanted).abs().max()))
    assert error[0] < 0.1
    assert error[1] < error[0] / 4


@pytest.mark.parametrize("kind", list(host.MODELS))
def test_noise_is_that_of_the_coordinates(nodes, kind):
    """The spread of many samples; on flows it is wrong for a sampler that does not look."""
    patcher, z = host.ModelPatcher(kind), fs.start_noise((256, 1, 16, 8), 3)
    out, sigmas = run(nodes, patcher, "sde_dpmpp_2m", 100, z)
    assert float(out.std()) == pytest.approx(host.SPREAD, rel=0.02)
    if kind in FLOWS:
        blind = host.sample(patcher, host.KSAMPLER(K.sample_sde_dpmpp_2m), sigmas, z)
        assert abs(float(blind.std()) / host.SPREAD - 1) > 0.2


@pytest.mark.parametrize("kind", list(host.MODELS))
@pytest.mark.parametrize("grid", ["softened", "uniform", "karras", "lambda", "beta"])
def test_sigmas(nodes, kind, grid):
    patcher = host.ModelPatcher(kind)
    sampling = patcher.get_model_object("model_sampling")
    for denoise in (1.0, 0.6):
        (sigmas,) = made(nodes["FewstepSigmas"], patcher, 7, grid, denoise)
        assert len(sigmas) == 8
        assert sigmas[-1] == 0
        assert bool((sigmas[1:] < sigmas[:-1]).all())
        torch.testing.assert_close(
            sigmas[0] < sampling.sigma_max * 0.999, torch.tensor(denoise < 1)
        )
        if kind == "sd":  # told an index, and the level is that of the index
            near = (sigmas[:-1, None] / sampling.sigmas - 1).abs().min(1).values
            assert float(near.max()) < 1e-6
        if kind in FLOWS and grid == "uniform" and denoise == 1:
            shift = {"sd3": 3.0, "flux": math.exp(1.15)}[kind]
            u = torch.linspace(1, 0, 8)
            torch.testing.assert_close(sigmas, shift * u / (1 + (shift - 1) * u), rtol=1e-5, atol=0)
    (nothing,) = made(nodes["FewstepSigmas"], patcher, 7, grid, 0.0)
    assert len(nothing) == 0


def test_sigmas_of_integer_times(nodes):
    sd, flux = host.ModelPatcher("sd"), host.ModelPatcher("flux")
    (sigmas,) = made(nodes["FewstepSigmas"], sd, 4, "trailing", 1.0)
    table = sd.get_model_object("model_sampling").sigmas
    torch.testing.assert_close(sigmas[:-1], table[[999, 749, 499, 249]], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="'trailing' is for processes with integer times"):
        made(nodes["FewstepSigmas"], flux, 4, "trailing", 1.0)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_inpainting(nodes, kind):
    patcher, latent = host.ModelPatcher(kind), torch.full(SHAPE, 2.0)
    mask = torch.zeros(SHAPE)
    mask[..., :2] = 1.0
    (sigmas,) = made(nodes["FewstepSigmas"], patcher, 6, "softened", 0.7)
    (sampler,) = made(nodes["FewstepSampler"], "dpmpp_2m")
    out = host.sample(patcher, sampler, sigmas, noise(), latent, mask)
    torch.testing.assert_close(out[..., 2:], latent[..., 2:], rtol=1e-6, atol=1e-6)
    assert float((out[..., :2] - 2.0).abs().mean()) > 0.1


def test_seeds_and_stops(nodes):
    patcher = host.ModelPatcher("sd")
    (sigmas,) = made(nodes["FewstepSigmas"], patcher, 5, "softened", 1.0)
    (sampler,) = made(nodes["FewstepSampler"], "sde_dpmpp_2m")
    a, b, c = (host.sample(patcher, sampler, sigmas, noise(), seed=s) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)

    class Interrupted(Exception):  # noqa: N818
        pass

    def stop(i, *said):
        if i == 2:
            raise Interrupted

    patcher.model.asked.clear()
    with pytest.raises(Interrupted):
        host.sample(patcher, sampler, sigmas, noise(), callback=stop)
    assert len(patcher.model.asked) == 3


# -- recipes -------------------------------------------------------------------------------------


def recipe_of(plans, process):
    known = {"kind": "parameters", "size": 3, "values": torch.zeros(4).numpy(), "cond": {}}
    return fs.Recipe({p.nfe: p for p in plans}, (), repr(process), "noise", [], SHAPE[1:], known)


def write(thing, tmp_path, name):
    folder = tmp_path / "fewstep"
    folder.mkdir(exist_ok=True)
    thing.save(folder / name)
    return name


@pytest.mark.parametrize("solver", ["flow_ipndm_2", "unipc_2", "heun"])
@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_a_plan_from_a_file(nodes, tmp_path, solver, kind):
    """It does in ComfyUI what it does outside, on the process that it was made on."""
    patcher = host.ModelPatcher(kind)
    if kind == "sd":
        process, predicts = fs.DiscreteVP.scaled_linear(), "noise"
    else:
        process, predicts = fs.Flow(shift=3.0), "flow"
    plan = fs.plan(solver, process, 7, predicts=predicts)
    file = write(plan, tmp_path, "mine.safetensors")
    write(plan, tmp_path, "other.txt")
    inputs = nodes["FewstepRecipe"].INPUT_TYPES()["required"]
    assert inputs["file"][0] == [file]
    sampler, sigmas = made(nodes["FewstepRecipe"], patcher, file, 0)
    shown = []
    out = host.sample(
        patcher, sampler, sigmas, noise(), callback=lambda *said: shown.append(said[0])
    )
    assert shown == list(range(len(sigmas) - 1))
    assert len(patcher.model.asked) == 7
    first = plan.levels[0]
    x = noise() * math.hypot(first.alpha, first.sigma)

    def network(x, t):
        level = process.level(float(t[0]))
        gain = host.SPREAD**2 * level.alpha
        gain /= host.SPREAD**2 * level.alpha**2 + level.sigma**2
        D = host.MEAN + gain * (x - level.alpha * host.MEAN)
        return fs.convert(D, x, level, "data", predicts)

    denoiser = fs.Denoiser(network, process, predicts)
    wanted = fs.sample(denoiser, solver=plan, x=x, progress=False)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    changed = nodes["FewstepRecipe"].IS_CHANGED(patcher, file, 0)
    assert changed == (tmp_path / "fewstep" / file).stat().st_mtime


def test_recipes(nodes, tmp_path):
    patcher, process = host.ModelPatcher("sd"), fs.DiscreteVP.scaled_linear()
    plans = [fs.plan("dpmpp_2m", process, n, predicts="noise") for n in (5, 8)]
    file = write(recipe_of(plans, process), tmp_path, "r.safetensors")
    _, sigmas = made(nodes["FewstepRecipe"], patcher, file, 8)
    torch.testing.assert_close(sigmas, K.get_sigmas(plans[1]))
    for nfe in (0, 6):
        with pytest.raises(ValueError, match=f"nfe = {nfe}; r.safetensors has plans for 5, 8"):
            made(nodes["FewstepRecipe"], patcher, file, nfe)
    sampler, _ = made(nodes["FewstepRecipe"], patcher, file, 5)
    with pytest.raises(ValueError, match="this plan is made for 6 from"):
        host.sample(patcher, sampler, sigmas, noise())
    with pytest.raises(FileNotFoundError, match="'gone' is not in models/fewstep"):
        made(nodes["FewstepRecipe"], patcher, "gone", 5)
    (tmp_path / "fewstep" / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"neither a recipe .* nor a plan"):
        made(nodes["FewstepRecipe"], patcher, "bad.safetensors", 5)


def test_a_recipe_for_other_noise_levels_is_refused(nodes, tmp_path):
    far = write(fs.plan("ddim", fs.EDM(0.002, 500.0), 6), tmp_path, "far.safetensors")
    with pytest.raises(ValueError, match=r"sigma = .* to 500, but this model knows .* to 14\.6"):
        made(nodes["FewstepRecipe"], host.ModelPatcher("sd"), far, 0)
    flow = write(fs.plan("ddim", fs.Flow(), 6), tmp_path, "flow.safetensors")
    with pytest.raises(ValueError, match="alpha = 0"):
        made(nodes["FewstepRecipe"], host.ModelPatcher("sd"), flow, 0)
    made(nodes["FewstepRecipe"], host.ModelPatcher("flux"), flow, 0)


# -- what is around the nodes --------------------------------------------------------------------


def test_ksampler_has_none_unless_asked(comfy, pack):
    assert comfy["comfy.samplers"].SAMPLER_NAMES == ["euler", "heun"]
    assert vars(comfy["comfy.k_diffusion.sampling"]).keys().isdisjoint({"sample_fewstep_heun"})


def test_ksampler_on_request(comfy, monkeypatch):
    monkeypatch.setenv("FEWSTEP_KSAMPLER", "dpmpp_3m, flow_ipndm_2")
    for _ in range(2):  # reloaded
        nodes = host.load(monkeypatch).NODE_CLASS_MAPPINGS
    names = ["euler", "heun", "fewstep_dpmpp_3m", "fewstep_flow_ipndm_2"]
    assert names == comfy["comfy.samplers"].KSampler.SAMPLERS
    for kind in ("sd", "sd3"):
        patcher = host.ModelPatcher(kind)
        (sigmas,) = made(nodes["FewstepSigmas"], patcher, 6, "softened", 1.0)
        (sampler,) = made(nodes["FewstepSampler"], "dpmpp_3m")
        a, b = (
            host.sample(patcher, s, sigmas, noise())
            for s in (sampler, host.ksampler("fewstep_dpmpp_3m"))
        )
        assert torch.equal(a, b)
    monkeypatch.setenv("FEWSTEP_KSAMPLER", "all")
    host.load(monkeypatch)
    assert len(comfy["comfy.samplers"].SAMPLER_NAMES) == 2 + len(fs.solvers)
    monkeypatch.setenv("FEWSTEP_KSAMPLER", "huen")
    with pytest.raises(ValueError, match="solver = 'huen' is not known; did you mean 'heun'"):
        host.load(monkeypatch)


def test_ksampler_elsewhere(comfy, monkeypatch, caplog):
    monkeypatch.setenv("FEWSTEP_KSAMPLER", "heun")
    comfy["comfy.samplers"].KSampler.SAMPLERS = ("euler",)
    assert host.load(monkeypatch).NODE_CLASS_MAPPINGS
    assert "keeps its samplers elsewhere" in caplog.text


def test_without_fewstep(comfy, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **keywords):
        if name == "fewstep":
            raise ModuleNotFoundError(name)
        return real(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install fewstep"):
        host.load(monkeypatch)


def test_files_of_the_folder():
    tomllib = pytest.importorskip("tomllib")
    about = tomllib.loads((host.FOLDER / "pyproject.toml").read_text())
    wanted = (host.FOLDER / "requirements.txt").read_text().split()
    assert about["project"]["dependencies"] == wanted == ["fewstep"]
    assert about["project"]["version"] == fs.__version__
    assert re.fullmatch(r"[a-z-]+", about["project"]["name"])
    assert "comfy" in about["tool"]
