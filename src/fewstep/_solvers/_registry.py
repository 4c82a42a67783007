"""The names. One line per solver; tests, the command line and the docs iterate over it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf

from .._prediction import unknown
from ._base import Multistep, Solver
from ._exponential import Second, exponential

__all__ = ["Registry", "as_solver", "solvers"]


class Registry(Mapping[str, Solver]):
    """Solvers by name. Iterating gives each solver once; look-up knows aliases too."""

    def __init__(self, *entries: Solver) -> None:
        self._entries: dict[str, Solver] = {}
        self._aliases: dict[str, str] = {}
        for solver in entries:
            self.register(solver)

    def register(self, solver: Solver) -> Solver:
        """Add a solver; a name can be given once."""
        for name in (solver.name, *solver.aliases):
            if name in self._entries or name in self._aliases:
                raise ValueError(f"solver name {name!r} is taken")
        self._entries[solver.name] = solver
        self._aliases.update(dict.fromkeys(solver.aliases, solver.name))
        return solver

    def __getitem__(self, name: str) -> Solver:
        name = self._aliases.get(name, name)
        if name not in self._entries:
            raise KeyError(unknown("solver", name, [*self._entries, *self._aliases]))
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


_DDIM = "Denoising Diffusion Implicit Models, 2010.02502, eq. 12 (eta = 0)"
_DPM = "DPM-Solver, 2206.00927, appendix"
_DPMPP = "DPM-Solver++, 2211.01095"
_UNIPC = "UniPC, 2302.04867, algorithms 1 and 2"
_DEIS = "Fast Sampling with Exponential Integrator, 2204.13902, eq. 14"
_AB = "exponential Adams-Bashforth, exact weights; compare 2211.01095, 2310.13268"


def _unipc(
    p: int, second: Second, name: str, variant: str, aliases: tuple[str, ...] = ()
) -> Multistep:
    return exponential(
        p,
        second=second,
        corrector=True,
        lower_final=True,
        growth=inf,
        name=name,
        source=f"{_UNIPC}, {variant}",
        aliases=aliases,
    )


# Names from the literature are the published method to the letter: no guard (growth = inf).
solvers = Registry(
    exponential(1, name="ddim", source=_DDIM, aliases=("euler", "dpm_solver_1", "dpmpp_1m")),
    exponential(2, second="midpoint", growth=inf, name="dpmpp_2m", source=f"{_DPMPP}, algorithm 2"),
    exponential(
        2, growth=inf, name="dpmpp_2m_heun", source=f"{_DPMPP}, official code", aliases=("ab2",)
    ),
    exponential(
        3,
        second="midpoint",
        third="shipped",
        growth=inf,
        name="dpmpp_3m_shipped",
        source=f"{_DPMPP}, as every code base ships it: second order",
    ),
    exponential(3, name="dpmpp_3m", source=f"{_DPMPP}, corrected", aliases=("ab3",)),
    exponential(4, name="ab4", source=_AB),
    exponential(2, form="noise", second="midpoint", growth=inf, name="dpm_solver_2m", source=_DPM),
    *(exponential(p, form="noise", name=f"noise_ab{p}", source=_AB) for p in (2, 3, 4)),
    *(_unipc(p, "midpoint", f"unipc_{p}", "bh2", ("unipc",) * (p == 2)) for p in (1, 2, 3)),
    *(_unipc(p, "bh1", f"unipc_{p}_bh1", "bh1") for p in (1, 2, 3)),
    exponential(2, form="flow", variable="own", corrector=True, name="flow_pc2", source=_AB),
    *(exponential(p, form="v", variable="own", name=f"v_ab{p}", source=_AB) for p in (2, 3, 4)),
    *(
        exponential(p, form="flow", variable="own", name=f"flow_ab{p}", source=_AB)
        for p in (2, 3, 4)
    ),
    exponential(2, form="flow", name="flow_exp2", source=_AB),
    *(
        exponential(
            q + 1, form="noise", variable="t", growth=inf, name=f"deis_tab{q}", source=_DEIS
        )
        for q in (1, 2, 3)
    ),
    *(
        exponential(
            q + 1,
            form="noise",
            variable="rho",
            growth=inf,
            name=f"deis_rhoab{q}",
            source=_DEIS,
            aliases=(f"lms{q + 1}",),
        )
        for q in (1, 2, 3)
    ),
)


def as_solver(solver: str | Solver) -> Solver:
    """Look a solver up by name."""
    if isinstance(solver, Solver):
        return solver
    if not isinstance(solver, str):
        raise ValueError(f"solver = {solver!r}; give a name, a solver or a plan")
    try:
        return solvers[solver]
    except KeyError as error:
        raise ValueError(error.args[0]) from None
