"""Print the README's table: what the default solver and grid are worth against the usual ones.

    python benchmarks/readme_table.py

Median over noises of the per-sample RMS distance to the converged solution of the same model and
noise. Problems and references are those of `defaults.py`.
"""

from __future__ import annotations

from defaults import Choice, measure

PROBLEMS = {
    "network of photographs, EDM": "photographs EDM",
    "network of photographs, scaled-linear table": "photographs table",
    "network of photographs, flow": "photographs flow",
    "trained digits, EDM": "trained EDM",
    "trained digits, guidance 1.5": "guided EDM",
    "trained digits, scaled-linear table": "trained table",
    "trained digits, flow": "trained flow",
    "exact patches, EDM": "patches EDM",
    "exact patches, VP": "patches VP",
    "exact patches, scaled-linear table": "patches table",
    "exact patches, flow": "patches flow",
    "exact digits, EDM": "digits EDM",
}
NFES = (5, 8, 12)
CANDIDATES = {
    "default (`flow_ipndm_2`, `softened_8`)": ("flow_ipndm_2", "softened_8"),
    "`flow_ipndm_2`, `softened`": ("flow_ipndm_2", "softened"),
    "`cflow_pc2`, `softened_8`": ("cflow_pc2", "softened_8"),
    "`dpmpp_2m`, `karras`": ("dpmpp_2m", "karras"),
    "`ddim`, `uniform`": ("ddim", "uniform"),
}


def main() -> None:
    """Measure and print."""
    solvers, grids = (tuple(dict.fromkeys(c)) for c in zip(*CANDIDATES.values(), strict=True))
    results = measure(tuple(PROBLEMS.values()), NFES, Choice(False, solvers, grids), jobs=2)
    found = {(r.problem, r.nfe, r.solver, r.grid, r.final): r.median for r in results}
    print(f"| median error at {', '.join(map(str, NFES))} NFE | {' | '.join(CANDIDATES)} |")
    print(f"| --- {'| --- ' * len(CANDIDATES)}|")
    for title, problem in PROBLEMS.items():
        cells = [
            " ".join(f"{found[problem, n, solver, grid, 'zero']:.3f}" for n in NFES)
            for solver, grid in CANDIDATES.values()
        ]
        print(f"| {title} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
