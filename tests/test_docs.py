"""Every block of code of the documents runs; every printed plan is what is printed.

A Python block that imports fewstep begins a program, and the blocks after it go on with it, as one
reads a page. `<!-- slow -->` above a block says that its program takes long.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

import fewstep as fs
import peers
from fewstep._commands import app

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
SLOW = "<!-- slow -->\n"


def blocks(name: str, language: str) -> list[str]:
    text = (ROOT / name).read_text()
    return [
        slow + block
        for slow, block in re.findall(
            rf"^({SLOW}|)```{language}\n(.*?)```", text, flags=re.DOTALL | re.MULTILINE
        )
    ]


def programs(name: str) -> list[str]:
    found: list[str] = []
    for block in blocks(name, "python"):
        if not found or re.search(r"^import fewstep", block, flags=re.MULTILINE):
            found.append("")
        found[-1] += block + "\n"
    return found


def _programs() -> list[Any]:
    return [
        pytest.param(name, text, id=f"{name}-{i}", marks=[pytest.mark.slow] if SLOW in text else [])
        for name in DOCUMENTS
        for i, text in enumerate(programs(name), 1)
    ]


@pytest.mark.parametrize(("name", "text"), _programs())
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_python_blocks_run(name, text, tmp_path, monkeypatch, capsys):
    if "import deepinv" in text:
        peers.deepinv()
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    if name == "docs/diffusers.md":
        variables = pipeline(monkeypatch)
    if "cifar10.safetensors" in text:
        checkpoint(tmp_path / "cifar10.safetensors")
    before = dict(fs.solvers._entries)
    try:
        exec(compile(text.replace(SLOW, ""), name, "exec"), variables)
    finally:
        fs.solvers._entries.clear()
        fs.solvers._entries.update(before)


def pipeline(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`pipe` and `prompts`: Stable Diffusion around a tiny network, calibrated in a small way."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT / "tests/diffusers"))
    from pipelines import pipelines

    pipe = pipelines["sd"]().pipe
    pipe.unet.register_to_config(sample_size=4)
    pipe.unet.time_embedding.linear_1.weight.data.zero_()  # smooth in time: it converges quickly
    pipe.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, prediction_type="v_prediction", set_alpha_to_one=True
    )
    calibrate = fs.diffusers.calibrate
    quick = {"methods": ["compensated"], "noises": (8, 4, 8), "progress": False}
    monkeypatch.setattr(
        fs.diffusers, "calibrate", lambda *args, **kw: calibrate(*args, **{**kw, **quick})
    )
    monkeypatch.setattr("fewstep._calibrate._calibrate._SOLVERS", ("ddim", "dpmpp_2m", "flow_pc2"))
    monkeypatch.setattr("fewstep._calibrate._calibrate._GRIDS", ("softened",))
    return {"pipe": pipe, "prompts": ["a cat", "a dog"]}


def checkpoint(path: Path) -> None:
    """A class-conditional network of EDM's, small and with random weights."""
    from test_checkpoints import SHAPES, state

    weights = state("edm-adm")
    for name in [n for n in SHAPES["edm-adm"] if "label" in n and n.endswith("weight")]:
        weights[name] = weights[name][:, :1].repeat(1, 10)  # of ten classes
    save_file(weights, path, metadata={"formulation": "edm"})


def test_the_printed_plan_is_what_is_printed():
    (text,) = blocks("README.md", "text")
    assert text.rstrip() == str(fs.plan("dpmpp_2m", fs.VP(), nfe=5)).rstrip()


# -- the command line ------------------------------------------------------------------------------

#: What makes a command of the documents small; None: it needs what a test does not have.
REDUCED: dict[str, list[str] | None] = {
    "calibrate": ["--noises", "16,8,16", "--methods", "learned", "--budget", "10"],
    "compare": ["--count", "96", "--nfe", "4", "--solvers", "ddim,dpmpp_2m"],
    "convert": None,
    "generate": [],
    "models": [],
    "plan": [],
    "recommend": ["--count", "64"],
    "sample": [],
    "solvers": [],
}
LONG = {"calibrate", "compare", "recommend"}


def commands(name: str) -> list[list[str]]:
    lines = "\n".join(blocks(name, "sh")).replace("\\\n", " ").splitlines()
    found = [re.match(r"(?:.*--no-python |.*&& )?fewstep (\w.*)", line) for line in lines]
    return [shlex.split(m[1], comments=True) for m in found if m]


@pytest.mark.parametrize("name", [n for n in DOCUMENTS if commands(n)])
def test_commands_are_understood(name):
    group = typer.main.get_command(app)
    for command, *arguments in commands(name):
        group.commands[command].make_context(command, arguments)  # type: ignore[attr-defined]


def _pages_of_commands() -> list[Any]:
    pages = [n for n in DOCUMENTS if commands(n)]
    long = {n for n in pages if LONG & {c[0] for c in commands(n)}}
    return [pytest.param(n, marks=[pytest.mark.slow] if n in long else []) for n in pages]


@pytest.mark.parametrize("name", _pages_of_commands())
def test_commands_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in commands(name):
        reduced = REDUCED[command[0]]
        if reduced is None or "--ray" in command:
            continue
        done = CliRunner().invoke(app, [*command, *reduced])
        assert done.exit_code == 0, f"{shlex.join(command)}: {done.output}"


# -- the reference ---------------------------------------------------------------------------------


def test_the_reference_has_every_public_name_once():
    pages = "\n".join(p.read_text() for p in (ROOT / "docs/api").glob("*.md"))
    named = re.findall(r"^::: fewstep\.(\S+)$", pages, flags=re.MULTILINE)
    extras = ["deepinv", "diffusers", "k_diffusion"]
    assert sorted(named) == sorted([*fs.__all__, *extras])
