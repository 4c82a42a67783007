"""Many samples to many files: N samples of a model in shards, by any number of processes, killed
and restarted as often as need be.

A shard is the unit of work: the file of the samples [k S, (k + 1) S), computed in batches that are
cut from its first sample on, and written to a temporary name, flushed to the disk and renamed. A
file under a final name is therefore complete, whatever happened, and a shard is the same whoever
makes it: there is nothing to agree on between processes, and a restart makes what is missing.

Batches are fixed because bits depend on them: a network's matrix products take other kernels, which
add in another order, at other batch sizes (and with other numbers of threads on a CPU). Noise and
steps do not depend on either. So batch and threads are settings of a job, kept in its manifest, not
properties of the machine that happens to run it.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import json
import math
import os
import re
import shutil
import tarfile
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ._calibrate._fingerprint import _modules, guidance_of, network_of
from ._calibrate._statistics import digest
from ._calibrate._teacher import taken
from ._denoiser import Guided, Model, Wrapper
from ._files import plan_arrays
from ._grids import Grid
from ._noise import Noise
from ._plan import Plan
from ._prediction import unknown
from ._sampling import DEFAULT_GRID, DEFAULT_SOLVER, PlanSource, _compile, sample
from ._solvers._base import Solver
from ._version import __version__

__all__ = ["FORMATS", "Conditions", "generate"]

#: What follows the name of a shard: a file, or nothing for a folder of pictures.
FORMATS = {"npz": ".npz", "tar": ".tar", "png": ""}
_FORMAT = "fewstep.generate.1"
_MANIFEST, _INDEX, _PART = "manifest.json", "SHA256SUMS", ".part"
#: Entries of a manifest that say nothing to a person.
_DIGESTS = ("weights", "uncond", "cond", "plan")

#: Conditions of some samples, batch first, from their indices (int64).
Conditions = Callable[[Tensor], Mapping[str, Any]]
#: Index of the first sample, samples (n, ...), and the conditions to be kept, (n,) each.
Batch = tuple[int, NDArray[Any], dict[str, NDArray[Any]]]


def generate(
    model: Model | Callable[[], Model],
    count: int,
    out: str | os.PathLike[str],
    *,
    shape: Sequence[int],
    solver: str | Solver | Plan | PlanSource = DEFAULT_SOLVER,
    nfe: int | None = None,
    grid: str | Grid | Sequence[float] = DEFAULT_GRID,
    final: str = "zero",
    seed: int = 0,
    path: bool = False,
    cond: Mapping[str, Any] | Conditions | None = None,
    format: str = "npz",
    pixels: tuple[float, float] | None = None,
    shard: int = 1024,
    batch: int = 64,
    threads: int = 1,
    device: torch.device | str | None = None,
    progress: bool = True,
    ray: int | None = None,
) -> list[Path]:
    """Write the samples 0 to count - 1 to the folder `out`, and return the shards that are there.

    Called again with the same arguments it makes what is missing, in any number of processes; with
    others it refuses. Under torchrun (or in processes of torch.distributed) process r of R makes
    the shards r, r + R, ...; none waits for another, and the last one writes SHA256SUMS. Sample k
    starts from the noise of (seed, k), as in `fewstep.sample(seed=seed, first=k)`.

    model: a `Denoiser` or `Guided`, or a function that makes it. shape: of one sample.
    solver, nfe, grid, final: see `fewstep.plan`; or a `Plan`, or a `Recipe`.
    path: stochastic solvers follow one Brownian path per sample (`Noise(path=True)`).
    cond: keyword arguments for the network: a function of the indices of a batch (int64 tensor), or
        tensors, arrays and lists of n entries, which samples take in turn (sample k entry k mod n).
        Conditions that are a number or a string per sample are saved along.
    format: "npz": `samples` (n, *shape), and one array per saved condition. "tar": WebDataset, per
        sample 000000012.npy or .png, `label` as .cls, other conditions as .json. "png": a folder of
        pictures per shard, conditions in its labels.json.
    pixels: the values (low, high) that become 0 and 255: 8-bit samples. Without it they are float32
        arrays. Pictures, (height, width) or (1 or 3, height, width), need it.
    shard, batch: samples per file, and per network call. threads: of each process on a CPU. Last
        bits of samples depend on batch and threads, so that they are settings of the job.
    device: of the state; default: the network's.
    ray: instead of here, run in so many workers of Ray Data, each with one GPU if `device` is one.
    """
    where, shards = Path(out), -(-natural("count", count) // natural("shard", shard))
    job = partial(
        Job, model, count, where.absolute(), shape, solver, nfe, grid, final, seed, path, cond,
        format, pixels, shard, batch, threads, device,
    )  # fmt: skip
    if ray is not None:
        from ._ray import run_on_ray

        run_on_ray(job, shards, ray, device)
    else:
        rank, world = _place()
        here = job()
        here.claim()
        here.run(range(rank, shards, world), progress and rank == 0)
    return finish(where, format, shards)


@dataclass
class Job:
    """What `generate` is asked for."""

    model: Any
    count: int
    out: Path
    shape: Sequence[int]
    solver: Any
    nfe: int | None
    grid: Any
    final: str
    seed: int
    path: bool
    cond: Any
    format: str
    pixels: tuple[float, float] | None
    shard: int
    batch: int
    threads: int
    device: Any

    def __post_init__(self) -> None:
        for name in ("count", "shard", "batch", "threads"):
            setattr(self, name, natural(name, getattr(self, name)))
        self.shape = tuple(self.shape)
        if not all(isinstance(n, Integral) and n > 0 for n in self.shape):
            raise ValueError(f"shape = {self.shape}; need positive integers, of one sample")
        if self.format not in FORMATS:
            raise ValueError(unknown("format", self.format, FORMATS))
        if self.pixels is not None:
            low, high = map(float, self.pixels)
            self.pixels = low, high
            if not -math.inf < low < high < math.inf:
                raise ValueError(f"pixels = {self.pixels}; need (low, high), such as (-1, 1)")
        elif self.format == "png":
            raise ValueError(
                "pixels is missing; give the values that become black and white, such as (-1, 1)"
            )
        self.pictures = self.format == "png" or (self.format == "tar" and self.pixels is not None)
        if self.pictures:
            _check_picture(self.shape)
        if self.count > 2**32:
            raise ValueError(f"count = {self.count}; there are 2^32 samples of a seed")
        if not isinstance(self.seed, Integral):
            raise ValueError(f"seed = {self.seed!r}; need one integer")
        Noise(self.seed)  # checks its range
        if _makes_a_model(self.model):
            self.model = self.model()
        self.plan = _compile(self.model, self.solver, self.nfe, self.grid, self.final, None, False)
        if self.path and not self.plan.stochastic:
            raise ValueError(f"path: {self.plan.about.get('solver', 'the plan')} draws no noise")
        self.device = torch.device(self.model.device if self.device is None else self.device)
        self.conditions, self.kept = _conditions(self.cond)

    def span(self, k: int) -> range:
        """The samples of a shard."""
        return range(k * self.shard, min((k + 1) * self.shard, self.count))

    # Manifest ------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What decides about the samples, and what the last bits depend on besides."""
        network = network_of(self.model)
        modules = list(dict.fromkeys(_modules(network)))
        ends = [self.conditions(torch.tensor([k])) for k in (0, self.count - 1)]
        made = {
            "model": type(self.model).__name__,
            "network": getattr(network, "__qualname__", type(network).__qualname__),
            "weights": digest([m.state_dict() for m in modules]) if modules else None,
            "process": re.sub(" at 0x[0-9a-f]+", "", repr(self.model.process)),
            "predicts": self.model.prediction.name,
            "guidance": guidance_of(self.model),
            "uncond": digest([m.uncond for m in _chain(self.model) if isinstance(m, Guided)]),
            "cond": digest(self.cond if isinstance(self.cond, Mapping) else ends),
            "solver": self.plan.about.get("solver"),
            "grid": self.plan.about.get("grid"),
            "nfe": self.plan.nfe,
            "plan": digest(plan_arrays(self.plan)),
            "seed": int(self.seed),
            "path": bool(self.path),
            "count": self.count,
            "shape": list(self.shape),
            "format": self.format,
            "pixels": None if self.pixels is None else list(self.pixels),
            "shard": self.shard,
            "batch": min(self.batch, self.shard),
            "threads": self.threads,
        }
        kind = self.device.type
        cuda = kind == "cuda" and torch.cuda.is_available()
        name = torch.cuda.get_device_name(self.device) if cuda else ""
        if kind == "cpu":
            name = torch.backends.cpu.get_cpu_capability()
        software = {"fewstep": __version__, "torch": str(torch.__version__)}
        if self.pictures:
            software["pillow"] = __import__("PIL").__version__
        return {"format": _FORMAT, "job": made, "with": {**software, "device": f"{kind} {name}"}}

    def claim(self) -> None:
        """Make the folder this job's; refuse one that is another's."""
        mine = json.loads(json.dumps(self.describe()))  # as it is read: lists, no tuples
        file = self.out / _MANIFEST
        with _said(self.out, "the folder cannot be used"):
            self.out.mkdir(parents=True, exist_ok=True)
            if not file.exists():
                found = [p.name for p in self.out.iterdir() if not p.name.endswith(_PART)]
                if found and not file.exists():  # by now another process may have begun
                    raise ValueError(
                        f"out = {str(self.out)!r} has {found[0]!r} and no {_MANIFEST}; give a new "
                        "folder, or one of an earlier run"
                    )
                with _published(file) as part:
                    part.write(json.dumps(mine, indent=1).encode() + b"\n")
            content = file.read_bytes()
        try:
            theirs = json.loads(content)
            job, software = dict(theirs["job"]), dict(theirs["with"])
            if theirs["format"] != _FORMAT:
                raise ValueError(f"format {theirs['format']!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"out = {str(self.out)!r}: its {_MANIFEST} is none of fewstep generate ({error}); "
                "give another folder"
            ) from error
        if said := _differences(job, mine["job"]):
            raise ValueError(
                f"out = {str(self.out)!r} belongs to another job: {said}; give another folder, or "
                "the same settings"
            )
        if said := _differences(software, mine["with"]):
            warnings.warn(
                f"out = {str(self.out)!r} was begun elsewhere: {said}; last bits of samples may "
                "differ from those of one run",
                stacklevel=3,
            )

    # Work ----------------------------------------------------------------------------------------

    def run(self, mine: Sequence[int], progress: bool) -> None:
        """Make what is missing of these shards."""
        names = {k: target(self.out, self.format, k) for k in mine}
        todo = [k for k, name in names.items() if not name.exists()]
        begun = {names[k].name for k in todo}
        for part in self.out.glob(f"*{_PART}"):  # of a process that was killed
            if part.name.rsplit(".", 2)[0] in begun:
                _remove(part)
        total, left = (sum(len(self.span(k)) for k in some) for some in (mine, todo))
        with (
            tqdm(
                total=total, initial=total - left, unit="samples", delay=1.0, disable=not progress
            ) as bar,
            _threads(self.threads),
        ):
            for k in todo:
                lost = f"shard {k} is not written; the same call goes on from the complete ones"
                with (
                    _said(self.out, lost),
                    _published(names[k], folder=self.format == "png") as part,
                ):
                    _WRITERS[self.format](part, self, k, self._batches(k, bar.update))

    def _batches(self, k: int, told: Callable[[int], Any]) -> Iterator[Batch]:
        span = self.span(k)
        for a in span[:: self.batch]:
            index = torch.arange(a, min(a + self.batch, span.stop))
            cond = self.conditions(index)
            kept = {
                name: values
                for name, value in cond.items()
                if (self.kept is None or name in self.kept)
                and (values := _scalars(value, len(index))) is not None
            }
            try:
                x = sample(
                    self.model,
                    (len(index), *self.shape),
                    solver=self.plan,
                    seed=self.seed,
                    first=a,
                    noise=Noise(self.seed, a, self.path),
                    cond=_on(cond, self.device),
                    device=self.device,
                    progress=False,
                ).float()
                if not bool(x.isfinite().all()):
                    raise FloatingPointError("samples are not finite")
            except FloatingPointError as error:
                raise FloatingPointError(f"samples {a} to {int(index[-1])}: {error}") from error
            x = x.cpu()
            if self.pixels is not None:
                low, high = self.pixels
                x = ((x - low) / (high - low)).clamp(0, 1).mul(255).round().to(torch.uint8)
            yield a, x.numpy(), kept
            told(len(index))


def natural(name: str, value: Any) -> int:
    """An integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} = {value!r}; need an integer >= 1")
    return int(value)


def target(out: Path, format: str, k: int) -> Path:
    """The final name of a shard."""
    return out / f"shard-{k:06d}{FORMATS[format]}"


def finish(out: Path, format: str, shards: int) -> list[Path]:
    """The shards that are there; if that is all of them, their checksums (for `sha256sum -c`) are
    written, and what processes left that were killed is removed."""
    there = [name for k in range(shards) if (name := target(out, format, k)).exists()]
    if len(there) < shards:
        return there
    index = out / _INDEX
    with _said(out, f"{_INDEX} is not written; the same call writes it"):
        if not index.exists():
            with _published(index) as part:
                for shard in there:
                    for file in sorted(shard.iterdir()) if shard.is_dir() else [shard]:
                        name = file.relative_to(out).as_posix()
                        part.write(f"{_sha256(file)}  {name}\n".encode())
        for left in out.glob(f"*{_PART}"):
            _remove(left)
    return there


@contextlib.contextmanager
def _said(out: Path, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(f"out = {str(out)!r}: {error.strerror or error}: {what}") from error


def _makes_a_model(model: Any) -> bool:
    """Whether it is a function without arguments (a network has some)."""
    if isinstance(model, (Model, torch.nn.Module)) or not callable(model):
        return False
    try:
        inspect.signature(model).bind()
    except TypeError:
        return False
    return True


def _place() -> tuple[int, int]:
    """This process and the number of them: of torch.distributed, or as torchrun says."""
    d = torch.distributed
    if d.is_available() and d.is_initialized():
        return d.get_rank(), d.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _chain(model: Any) -> Iterator[Any]:
    while isinstance(model, Wrapper):
        yield model
        model = model.model


def _differences(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> str:
    names = [n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)]
    return ", ".join(
        f"{n} is another"
        if n in _DIGESTS
        else f"{n} is {json.dumps(theirs.get(n))} there and {json.dumps(mine.get(n))} here"
        for n in names
    )


# Conditions --------------------------------------------------------------------------------------


def _conditions(cond: Any) -> tuple[Conditions, set[str] | None]:
    """Conditions as a function, and which ones may be kept (None: any)."""
    if cond is None:
        return lambda index: {}, set()
    if not isinstance(cond, Mapping):
        if not callable(cond):
            raise ValueError(f"cond = {cond!r}; give a mapping, or a function of the indices")
        function: Any = cond
        return function, None
    sizes = {name: size for name, value in cond.items() for size in _sizes(value)}
    if len(set(sizes.values())) > 1 or 0 in sizes.values():
        said = ", ".join(f"{k} has {v}" for k, v in sizes.items())
        raise ValueError(f"cond: {said} entries; give all conditions the same number of entries")
    n = next(iter(sizes.values()), 1)
    return lambda index: taken(cond, (index % n).tolist(), n), set(sizes)


def _sizes(value: Any) -> Iterator[int]:
    if isinstance(value, Mapping):
        for part in value.values():
            yield from _sizes(part)
    elif isinstance(value, (list, tuple)) or (
        isinstance(value, (Tensor, np.ndarray)) and value.ndim
    ):
        yield len(value)


def _scalars(value: Any, n: int) -> NDArray[Any] | None:
    """A condition as numbers or strings, one per sample; None if it is anything else."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value if value.dtype != torch.bfloat16 else value.float()).numpy()
    elif isinstance(value, (list, tuple)) and all(isinstance(v, (str, int, float)) for v in value):
        value = np.array(value)
    if isinstance(value, np.ndarray) and value.shape == (n,) and value.dtype.kind in "biufU":
        return value
    return None


def _on(value: Any, device: torch.device) -> Any:
    """Tensors and arrays on the device."""
    if isinstance(value, Mapping):
        return {k: _on(v, device) for k, v in value.items()}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(value)
    return value.to(device) if isinstance(value, Tensor) else value


# Files -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _published(target: Path, folder: bool = False) -> Iterator[Any]:
    """A file (or a folder) to be written, which gets its name when it is complete and on the disk;
    when anything goes wrong it is gone."""
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex}{_PART}")
    try:
        if folder:
            part.mkdir()
            yield part
            _sync(part)
        else:
            with part.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
        try:
            os.replace(part, target)
        except OSError:
            # Another process makes the same (a job that was started twice): the same bytes.
            if not target.exists():
                raise
        _sync(target.parent)
    finally:
        _remove(part)


def _sync(folder: Path) -> None:
    """Names are on the disk."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _remove(part: Path) -> None:
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _sha256(file: Path) -> str:
    total = hashlib.sha256()
    with file.open("rb") as stream:
        while content := stream.read(1 << 20):
            total.update(content)
    return total.hexdigest()


def _write_npz(file: IO[bytes], job: Job, k: int, batches: Iterator[Batch]) -> None:
    kind = np.dtype(np.float32 if job.pixels is None else np.uint8)
    head = {"descr": kind.str, "fortran_order": False, "shape": (len(job.span(k)), *job.shape)}
    kept: dict[str, list[NDArray[Any]]] = {}
    with zipfile.ZipFile(file, "w") as archive:  # dates are 1980 unless one gives others
        with archive.open(zipfile.ZipInfo("samples.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, head)
            for _, x, labels in batches:
                member.write(x.tobytes())
                for name, values in labels.items():
                    kept.setdefault(name, []).append(values)
        for name, values in kept.items():
            if name == "samples":
                raise ValueError("cond: 'samples' is the name of the samples; name it otherwise")
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                np.lib.format.write_array(member, np.concatenate(values), allow_pickle=False)


def _write_tar(file: IO[bytes], job: Job, k: int, batches: Iterator[Batch]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for first, x, labels in batches:
            for i, one in enumerate(x):
                values = {name: column[i].item() for name, column in labels.items()}
                members = {"png": _png(one)} if job.pictures else {"npy": _npy(one)}
                if isinstance(values.get("label"), int):
                    members["cls"] = str(values.pop("label")).encode()
                if values:
                    members["json"] = json.dumps(values).encode()
                for ending, content in members.items():
                    info = tarfile.TarInfo(f"{first + i:09d}.{ending}")  # of 1970, by nobody
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


def _write_png(folder: Path, job: Job, k: int, batches: Iterator[Batch]) -> None:
    kept: dict[str, dict[str, Any]] = {}
    for first, x, labels in batches:
        for i, one in enumerate(x):
            name = f"{first + i:09d}.png"
            _put(folder / name, _png(one))
            if labels:
                kept[name] = {key: column[i].item() for key, column in labels.items()}
    if kept:
        _put(folder / "labels.json", json.dumps(kept, indent=0).encode())


_WRITERS: dict[str, Callable[[Any, Job, int, Iterator[Batch]], None]] = {
    "npz": _write_npz,
    "tar": _write_tar,
    "png": _write_png,
}


def _put(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _npy(x: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.asarray(x), allow_pickle=False)
    return stream.getvalue()


def _png(x: NDArray[Any]) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    picture = x if x.ndim == 2 else x[0] if len(x) == 1 else x.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(picture)).save(stream, "PNG")
    return stream.getvalue()


def _check_picture(shape: Sequence[int]) -> None:
    if not (len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))):
        raise ValueError(
            f"shape = {tuple(shape)} is no picture; need (height, width) or (1 or 3, height, "
            "width), or format 'npz', or 'tar' without pixels"
        )
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError('pictures need Pillow: pip install "fewstep[cli]"') from error
