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
#: Every file that iterates over the registry, and what of it concerns one solver.
FILES = ("test_solvers", "test_plan", "test_transform", "test_cost", "test_analysis", "test_docs")
CHOSEN = "toy or (test_ends and edm and karras and not budgets)"


def check(folder: Path, weight: float, order: int) -> tuple[int, str]:
    """Exit code and output of the checks with the toy registered."""
    text = TOY.replace("WEIGHT", str(weight)).replace("ORDER", str(order)).replace("START", START)
    (folder / "toy_plugin.py").write_text(text)
    paths = [str(folder), str(TESTS), os.environ.get("PYTHONPATH", "")]
    files = [str(TESTS / f"{name}.py") for name in FILES]
    command = [sys.executable, "-m", "pytest", "-p", "toy_plugin", "-n", "0", *files, "-k", CHOSEN]
    done = subprocess.run(
        [*command, "-o", "addopts=", "-m", "not slow", "-p", "no:cacheprovider", "-rf"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        cwd=TESTS.parent,
    )
    return done.returncode, done.stdout + done.stderr


def test_one_function_and_one_line_get_every_check(tmp_path):
    code, text = check(tmp_path, weight=0.5, order=2)
    assert code == 0, text[-3000:]
    counted = re.search(r"(\d+) passed", text)
    assert counted
    assert int(counted[1]) >= 38


@pytest.mark.parametrize(("weight", "order"), [(0.4, 2), (0.5, 3)])
def test_a_wrong_one_fails(tmp_path, weight, order):
    code, text = check(tmp_path, weight, order)
    assert code == 1, text[-3000:]
    assert "FAILED" in text
    assert "test_measured_order_is_the_declared_one[toy" in text
