"""docs/wrong-elsewhere.md: its tables are what the benchmark prints, its evidence exists.
docs/mathematics.md: its blocks run, and it has every solver with its names and source."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from wrong_elsewhere import TABLES, markdown  # noqa: E402

import fewstep as fs  # noqa: E402
from fewstep._names import NAMES, Names  # noqa: E402

PAGE = (ROOT / "docs" / "wrong-elsewhere.md").read_text()
PRINTED = dict(re.findall(r"<!-- table: ([\w-]+) -->\n\n((?:\|.*\n)+)", PAGE))
#: What the page says it is about. Others may have been repaired.
VERSIONS = {"diffusers": "0.42.1", "k_diffusion": "0.1.1"}
MATHEMATICS = (ROOT / "docs" / "mathematics.md").read_text()
#: A second each.
SLOW = {"landing", "published", "spacings", "truncated"}


def test_every_table_is_on_the_page():
    assert set(PRINTED) == set(TABLES)
    for name in TABLES:
        assert f"`{name}`" in PAGE.replace(PRINTED[name], ""), f"the page does not name {name}"
    for name, wanted in VERSIONS.items():
        assert f"{name.replace('_', '-')} {wanted}" in PAGE


def test_the_evidence_exists():
    cited = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(cited) > 10
    for path, name in cited:
        assert f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in TABLES]
)
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
def test_the_tables_are_what_is_measured(name):
    for peer in TABLES[name].peers:
        distribution = peer.replace("_", "-")
        try:
            found = version(distribution)
        except PackageNotFoundError:
            pytest.skip(f"{distribution} is not installed")
        if not found.startswith(VERSIONS[peer]):
            pytest.skip(f"{distribution} {found}; the page is about {VERSIONS[peer]}")
        if peer == "k_diffusion" and find_spec("torchsde") is None:
            pytest.skip("torchsde is not installed")
    measured = markdown(TABLES[name].rows()).splitlines()
    printed = PRINTED[name].splitlines()
    assert len(measured) == len(printed)
    for mine, theirs in zip(measured, printed, strict=True):
        for cell, other in zip(mine.split("|"), theirs.split("|"), strict=True):
            assert same(cell, other), f"{name}: the page has {theirs}, measured is {mine}"


NUMBER = re.compile(r"(?<![\w.+-])\d+(?:\.\d+)?(?:e[+-]\d+)?(?![\w-])")


def same(cell: str, other: str) -> bool:
    """Equal words, and numbers within a tenth (they are printed with two digits), or both of the
    size of rounding."""
    if NUMBER.sub("#", cell) != NUMBER.sub("#", other):
        return False
    pairs = zip(NUMBER.findall(cell), NUMBER.findall(other), strict=True)
    return all(
        abs(float(a) - float(b)) <= 0.1 * abs(float(b)) or max(float(a), float(b)) < 1e-7
        for a, b in pairs
    )


def test_a_wrong_table_is_seen():
    assert same("| 0.0029 |", "| 0.003 |")
    assert not same("| 0.0029 |", "| 0.0037 |")
    assert not same("| NaN |", "| 0.0037 |")
    assert not same("| order 2, 1.0e-04 |", "| order 2, 1.3e-04 |")
    assert same("| order 2, 1.0e-04 |", "| order 2, 1.0e-04 |")


# -- docs/mathematics.md ---------------------------------------------------------------------------


def names_table(names: list[str]) -> str:
    """Solvers with their names elsewhere and their source, from the registry; those that have both
    in common in one row."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name in names:
        solver, known = fs.solvers[name], NAMES.get(name, Names())
        places = zip(("diffusers", "k-diffusion", "ComfyUI"), _called(known), strict=True)
        elsewhere = "; ".join(f"{place}: {', '.join(calls)}" for place, calls in places if calls)
        rows.setdefault((elsewhere, solver.source), []).extend((name, *solver.aliases))
    titles = ["solver", "elsewhere", "source"]
    return markdown(
        [titles, *([", ".join(f"`{n}`" for n in mine), *row] for row, mine in rows.items())]
    )


def _called(known: Names) -> list[list[str]]:
    every = (known.diffusers, known.k_diffusion, known.comfyui)
    return [[f"`{call}`" for call in calls] for calls in every]


def test_every_solver_is_on_the_page_with_its_names():
    lists = re.findall(r"<!-- solvers: (.*) -->\n\n((?:\|.*\n)+)", MATHEMATICS)
    named = [name for names, _ in lists for name in names.split()]
    assert set(named) == set(fs.solvers)
    for names, printed in lists:
        assert printed.rstrip() == names_table(names.split())


@pytest.mark.parametrize(
    "block", re.findall(r"```python\n(.*?)```", MATHEMATICS, flags=re.DOTALL), ids=lambda _: ""
)
def test_the_blocks_of_the_mathematics_run(block):
    exec(compile(block, "docs/mathematics.md", "exec"), {})
