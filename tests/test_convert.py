"""`fewstep convert`: the layouts of the official files, made here; nothing in them runs."""

from __future__ import annotations

import collections
import hashlib
import os
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from fewstep import _convert
from fewstep._checkpoints import load_checkpoint
from fewstep._commands import app
from fewstep._convert import convert_checkpoint
from test_checkpoints import golden, state


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


@pytest.fixture
def edm_code(monkeypatch):
    """Stand-ins for the modules named in EDM's pickles; they are gone when one is read."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("the code of the file was run")

    class EasyDict(dict):
        pass

    for module, value in ((persistence, _reconstruct_persistent_obj), (util, EasyDict)):
        value.__module__, value.__qualname__ = module.__name__, value.__name__
        setattr(module, value.__name__, value)
    names = {
        "torch_utils": types.ModuleType("torch_utils"),
        "torch_utils.persistence": persistence,
        "dnnlib": types.ModuleType("dnnlib"),
        "dnnlib.util": util,
    }

    class Persistent:
        """Pickles as a decorated class does: source code, class name and attributes."""

        def __init__(self, class_name, attributes):
            self.named = (class_name, attributes)

        def __reduce__(self):
            meta = {
                "type": "class",
                "version": 6,
                "module_src": "raise SystemExit('source was run')",
            }
            meta.update(class_name=self.named[0], state=self.named[1])
            return _reconstruct_persistent_obj, (meta,), None

    def write(path, content):
        with monkeypatch.context() as patch:
            for name, module in names.items():
                patch.setitem(sys.modules, name, module)
            path.write_bytes(pickle.dumps(content(Persistent, EasyDict)))

    return write


def module(weights: dict[str, torch.Tensor], build, name: str, **attributes):
    """A tree of modules with these weights."""
    own, children = {}, collections.defaultdict(dict)
    for key, value in weights.items():
        first, dot, rest = key.partition(".")
        (children[first] if dot else own).__setitem__(rest or first, value)
    buffers = {k: v for k, v in own.items() if k in ("u", "freqs", "resample_filter")}
    parameters = {
        k: torch.nn.Parameter(v, requires_grad=False) for k, v in own.items() if k not in buffers
    }
    return build(
        name,
        {
            "training": False,
            "_parameters": collections.OrderedDict(parameters, bias_that_is_not=None),
            "_buffers": collections.OrderedDict(buffers),
            "_non_persistent_buffers_set": set(),
            "_modules": collections.OrderedDict(
                {k: module(v, build, "UNetBlock") for k, v in children.items()}, absent=None
            ),
            "_init_args": (),
            **attributes,
        },
    )


EDM = {
    "edm-ddpmpp-class": ("EDMPrecond", {"sigma_data": 0.7}),
    "vp-ddpmpp": ("VPPrecond", {"beta_min": 0.1, "beta_d": 19.9}),
    "ve-ncsnpp": ("VEPrecond", {"sigma_min": 0.02, "sigma_max": 100}),
    "iddpm-adm": ("iDDPMPrecond", {}),
}


@pytest.mark.parametrize("case", EDM)
def test_pickles_of_edm(case, edm_code, tmp_path):
    name, attributes = EDM[case]
    weights = state(case)

    def content(build, easy):
        net = module(weights, build, name, **attributes)
        return easy(ema=net, loss_fn=build("EDMLoss", easy(P_mean=-1.2)), dataset_kwargs=easy(a=1))

    edm_code(tmp_path / "net.pkl", content)
    meta = convert_checkpoint(tmp_path / "net.pkl", tmp_path / "net.safetensors")
    found = tensors(tmp_path / "net.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[k], weights[k]) for k in weights)
    assert (
        meta["sha256 of source"] == hashlib.sha256((tmp_path / "net.pkl").read_bytes()).hexdigest()
    )
    model = load_checkpoint(tmp_path / "net.safetensors")  # the formulation came along
    x = golden(case, "x")
    settings = {k: v for k, v in attributes.items() if k.startswith("sigma_")}
    convert_checkpoint(tmp_path / "net.pkl", tmp_path / "same", meta["formulation"])
    same = load_checkpoint(tmp_path / "same", **settings)
    t = model.process.t_start if model.rounds else 0.5 * model.process.t_start
    assert torch.equal(model(x, t), same(x, t))
    assert torch.isfinite(model(x, t)).all()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("case", ["score-ncsnpp", "score-ddpmpp"])
def test_checkpoints_of_score_sde_give_the_averages(case, zipped, tmp_path):
    weights = state(case)
    trained = [k for k in weights if not k.endswith(("sigmas", "all_modules.0.W"))]
    average = {k: weights[k] + 1 for k in trained}
    order = ["module.sigmas", *(k for k in weights if k != "module.sigmas")]
    content = {
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 2e-4}]},
        "model": collections.OrderedDict((k, weights[k]) for k in order),
        "ema": {"decay": 0.999, "num_updates": 3, "shadow_params": list(average.values())},
        "step": 3,
    }
    torch.save(content, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
    convert_checkpoint(
        tmp_path / "c.pth", tmp_path / "out", "vp" if case == "score-ddpmpp" else None
    )
    found = tensors(tmp_path / "out")
    want = {**weights, **average}
    assert found.keys() == want.keys()
    assert all(torch.equal(found[k], want[k]) for k in want)
    load_checkpoint(tmp_path / "out")
    content["ema"]["shadow_params"].pop()
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="averaged parameters"):
        convert_checkpoint(tmp_path / "c.pth", tmp_path / "out")


def test_plain_state_dicts(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    plain = {"b": base.T, "a": base, "epoch": 3, "c": base[1:]}  # views of one storage
    want = {"a": base, "b": base.T, "c": base[1:]}
    for content in (plain, {"state_dict": plain, "epoch": 3}, {"ema": plain, "model": {}}):
        torch.save(content, tmp_path / "p.pt")
        convert_checkpoint(tmp_path / "p.pt", tmp_path / "out")
        first = (tmp_path / "out").read_bytes()
        found = tensors(tmp_path / "out")
        assert found.keys() == want.keys()
        assert all(torch.equal(found[k], want[k]) for k in want)
        convert_checkpoint(tmp_path / "p.pt", tmp_path / "out")
        assert (tmp_path / "out").read_bytes() == first


class Runs:
    """Unpickled in the usual way, this makes a folder."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("kind", ["pickle", "zip", "old archive", "nested", "set state"])
def test_nothing_in_a_file_is_run(kind, tmp_path):
    mark, source, out = tmp_path / "was-run", tmp_path / "bad.pkl", tmp_path / "out"
    evil = {"ema": {"w": torch.ones(2)}, "more": Runs(os.mkdir, str(mark))}
    if kind == "pickle":
        source.write_bytes(pickle.dumps(evil))
    elif kind == "nested":  # inside what torch reads the bytes of a tensor with
        inner = pickle.dumps(Runs(os.mkdir, str(mark)))
        source.write_bytes(pickle.dumps(Runs(torch.storage._load_from_bytes, inner)))
    elif kind == "set state":  # attributes of a function that the reader itself uses
        change = b"c" + b"torch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__dict__}sb."
        source.write_bytes(b"\x80\x02" + change)
    else:
        torch.save(evil, source, _use_new_zipfile_serialization=kind == "zip")
    before = vars(torch._utils._rebuild_tensor_v2).copy()
    if kind == "pickle":  # numbers are read, the rest is left out
        convert_checkpoint(source, out)
        assert torch.equal(tensors(out)["w"], torch.ones(2))
    else:
        with pytest.raises(ValueError, match="source = ") as refused:
            convert_checkpoint(source, out)
        assert "weights_only" not in str(refused.value)  # torch's advice would be to run it
        assert not out.exists()
    assert not mark.exists()
    assert vars(torch._utils._rebuild_tensor_v2) == before
    if kind in ("pickle", "zip"):  # the trap is a real one
        with source.open("rb") as file:
            torch.load(file, weights_only=False) if kind == "zip" else pickle.load(file)
        assert mark.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not a pickle", "no pickle or torch archive"),
        (b"", "no pickle or torch archive"),
        (pickle.dumps({"a": 1, "b": 2}), "holds a, b; need a state dict"),
        (pickle.dumps([1, 2]), "holds list; need a state dict"),
        (pickle.dumps(os.path.join), "holds type; need"),
    ],
)
def test_mistakes(content, words, tmp_path):
    source = tmp_path / "s.pkl"
    source.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        convert_checkpoint(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_other_mistakes(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such file"):
        convert_checkpoint(tmp_path / "no", tmp_path / "out")
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="does not exist"):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "no" / "out")
    with pytest.raises(ValueError, match="did you mean 'subvp'"):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "out", "sub-vp")
    monkeypatch.setattr(_convert.torch, "__version__", "2.5.1")
    with pytest.raises(ValueError, match="CVE-2025-32434"):
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "out")


def test_command(tmp_path):
    torch.save(state("vp-ddpmpp"), tmp_path / "a.pt")
    arguments = ["convert", str(tmp_path / "a.pt"), str(tmp_path / "out"), "--formulation", "vp"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (
        "148 tensors, formulation vp" in result.output.replace("\n", " ")
        or "tensors" in result.output
    )
    assert hashlib.sha256((tmp_path / "a.pt").read_bytes()).hexdigest() in result.output
    load_checkpoint(tmp_path / "out")
    text = CliRunner().invoke(app, ["convert", "--help"], env={"COLUMNS": "100"}).output
    assert "The risk" in text
