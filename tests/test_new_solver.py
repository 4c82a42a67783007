"""A solver that is added with one function and one line gets every check, and a wrong one fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

#: Two-node data-form Adams in lambda, by hand; `ORDER` is what it claims.
TOY = '''
"""Adams-Bashforth: x_t = (sigma_t / sigma_s) x_s + W_0 D_s + W_1 D_{s-1}."""
import fewstep as fs
from math import expm1, isinf


def toy(process, history, end):
    start = history[0]
    ratio, total = end.sigma / start.sigma, end.alpha - start.alpha * end.sigma / start.sigma
    if len(history) == 1 or isinf(history[1].lam) or end.sigma == 0 or end.alpha == 0:
        rest = [0.0] * (len(history) - 1)
        return fs.Formula([ratio, *rest], [total, *rest], 1)
    h, back = end.lam - start.lam, start.lam - history[1].lam
    extra = WEIGHT * total * h / back
    return fs.Formula([ratio, 0.0], [total + extra, -extra], 2)


fs.solvers.register(fs.Multistep("toy", ORDER, toy, "a method of two nodes, by hand", "START"))
'''
START = "start-up orders 1, 2, ...; at sigma = 0 order 1"
#: The same of the reverse SDE (eta^2 = `eta2`), whose draws lie on one path: `CLOCK`.
NOISY = '''
"""Adams-Bashforth: x_t = (sigma_t / sigma_s) e^-E x_s + W_0 D_s + W_1 D_{s-1} + v z."""
import fewstep as fs
from fewstep._noise import Draw
from math import exp, expm1, isinf, sqrt


def made(eta2):
    def toy(process, history, end):
        start, rest = history[0], [0.0] * (len(history) - 1)
        h = end.lam - start.lam
        E = eta2 * h if eta2 else 0.0
        total = -end.alpha * expm1(-h - E)
        b, order = [total, *rest], 1
        if len(history) == 2 and not isinf(history[1].lam) and end.sigma > 0:
            extra = WEIGHT * total * h / (start.lam - history[1].lam)
            b, order = [total + extra, -extra], 2
        a = [end.sigma / start.sigma * exp(-E), *rest]
        if not eta2 or end.sigma == 0:
            return fs.Formula(a, b, order)
        draw = Draw(start, end, CLOCK)
        return fs.Formula(a, b, order, noise={draw: end.sigma * sqrt(-expm1(-2 * E))})

    return fs.Multistep(
        "toy", ORDER, toy, "a method of two nodes, by hand", "START", stochastic=eta2 > 0,
        strong_order=int(eta2 > 0), scaled=lambda s: made(eta2 * s * s), member="dpmpp_2m",
    )


fs.solvers.register(made(1.0))
'''
PLACES = "(eta2 * start.lam, eta2 * end.lam)"
#: Every file that iterates over the registry, and what of it concerns one solver.
FILES = ("test_solvers", "test_plan", "test_transform", "test_cost", "test_analysis", "test_docs")
FILES_OF_NOISE = ("test_weak", "test_strong", "test_transition")
CHOSEN = "toy or (test_ends and edm and karras and not budgets)"


def check(
    folder: Path, weight: float, order: int, toy: str = TOY, clock: str = PLACES
) -> tuple[int, str]:
    """Exit code and output of the checks with the toy registered."""
    text = toy.replace("WEIGHT", str(weight)).replace("ORDER", str(order)).replace("START", START)
    text = text.replace("CLOCK", clock)
    (folder / "toy_plugin.py").write_text(text)
    paths = [str(folder), str(TESTS), os.environ.get("PYTHONPATH", "")]
    files = [str(TESTS / f"{name}.py") for name in (*FILES, *(FILES_OF_NOISE * (toy == NOISY)))]
    command = [sys.executable, "-m", "pytest", "-p", "toy_plugin", "-n", "0", *files, "-k", CHOSEN]
    done = subprocess.run(
        [*command, "-o", "addopts=", "-m", "not slow", "-p", "no:cacheprovider", "-v", "-rf"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
    )
    return done.returncode, done.stdout + done.stderr


def checks_of(text: str) -> set[str]:
    """The test functions that passed. Of their cases a share is tried, so that numbers change."""
    return set(re.findall(r"::(test_\w+)\S* PASSED", text))


def test_one_function_and_one_line_get_every_check(tmp_path):
    code, text = check(tmp_path, weight=0.5, order=2)
    assert code == 0, text[-3000:]
    assert len(checks_of(text)) >= 20


@pytest.mark.parametrize(
    ("weight", "order"), [(0.4, 2), pytest.param(0.5, 3, marks=pytest.mark.slow)]
)
def test_a_wrong_one_fails(tmp_path, weight, order):
    code, text = check(tmp_path, weight, order)
    assert code == 1, text[-3000:]
    assert "FAILED" in text
    assert "test_measured_order_is_the_declared_one[toy" in text


@pytest.mark.slow
def test_a_stochastic_one_gets_every_check(tmp_path):
    code, text = check(tmp_path, weight=0.5, order=2, toy=NOISY)
    assert code == 0, text[-3000:]
    assert len(checks_of(text)) >= 26


@pytest.mark.parametrize(
    ("weight", "clock", "test"),
    [
        pytest.param(0.4, PLACES, "test_weak_order", marks=pytest.mark.slow),
        pytest.param(0.5, "(0.0, h)", "test_strong_order", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_stochastic_one_fails(tmp_path, weight, clock, test):
    code, text = check(tmp_path, weight, order=2, toy=NOISY, clock=clock)
    assert code == 1, text[-3000:]
    assert f"{test}_is_the_declared_one[toy" in text.replace("on_one_path_", "")
