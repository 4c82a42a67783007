def combine(
    parallel: int, threads: int, size: int, out: int, kind: int, /, *terms: float
) -> None: ...
def normals(
    parallel: int,
    threads: int,
    batch: int,
    count: int,
    out: int,
    table: int,
    samples: int,
    /,
    *terms: float,
) -> None: ...
