"""Files of many samples: the same bytes for any number of processes, kills and restarts."""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep as fs
from fewstep._generate import generate

LABELS = {"label": torch.arange(10)}
SETTINGS: dict[str, Any] = {
    "shape": (1, 8, 8),
    "nfe": 3,
    "cond": LABELS,
    "shard": 4,
    "batch": 3,
    "progress": False,
}
PIXELS = (-1.0, 1.0)


def digits() -> fs.Guided:
    return fs.Guided(fs.models.load("digits"), 1.5, {"label": 10})


def contents(folder: Path) -> dict[str, bytes]:
    """All files, by their names in the folder."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


# What is written ----------------------------------------------------------------------------------


def test_samples_are_those_of_sample_and_labels_are_with_them(tmp_path):
    there = generate(digits(), 10, tmp_path / "out", **SETTINGS)
    assert [p.name for p in there] == [f"shard-00000{k}.npz" for k in range(3)]
    for k, file in enumerate(there):
        stop = min(4 * k + 4, 10)
        parts = []
        for a, b in ((4 * k, min(4 * k + 3, stop)), (4 * k + 3, stop)):
            if a < b:
                label = {"label": torch.arange(a, b)}
                parts.append(fs.sample(digits(), (b - a, 1, 8, 8), nfe=3, first=a, cond=label))
        with np.load(file) as shard:
            assert shard["samples"].dtype == np.float32
            assert np.array_equal(shard["samples"], torch.cat(parts).numpy())
            assert shard["label"].tolist() == list(range(4 * k, stop))


def test_noise_of_a_sample_does_not_depend_on_how_a_job_is_cut(tmp_path):
    # An elementwise network has no sums, so that bits do not depend on the batch.
    model = fs.Denoiser(lambda x, t: x / 3, fs.VP())
    whole = []
    for name, shard, batch in (("a", 20, 20), ("b", 7, 2)):
        there = generate(
            model, 20, tmp_path / name, shape=(5,), solver="sde_dpmpp_2m", nfe=3, path=True,
            seed=3, shard=shard, batch=batch,
        )  # fmt: skip
        whole.append(np.concatenate([np.load(p)["samples"] for p in there]))
    x = fs.sample(
        model, (20, 5), solver="sde_dpmpp_2m", nfe=3, seed=3, noise=fs.Noise(3, path=True)
    )
    assert np.array_equal(whole[0], x.numpy())
    assert np.array_equal(whole[1], x.numpy())


def test_all_formats_hold_the_same(tmp_path):
    def cond(index):  # two numbers to keep, and what is none
        return {
            "label": index % 10,
            "even": [bool(k % 2 == 0) for k in index],
            "wide": index[:, None],
        }

    digit = digits()
    model = fs.Denoiser(
        lambda x, t, label, even, wide: digit.output(x, t, fs.Level(1, 0, 0, 0), {"label": label}),
        digit.process,
        digit.prediction,
    )
    runs = {}
    for name, format, pixels in (
        ("npz", "npz", None),
        ("bytes", "npz", PIXELS),
        ("tar", "tar", None),
        ("pictures", "tar", PIXELS),
        ("png", "png", PIXELS),
    ):
        out = tmp_path / name
        generate(model, 6, out, **{**SETTINGS, "cond": cond}, format=format, pixels=pixels)
        runs[name] = out
    for k, first, n in ((0, 0, 4), (1, 4, 2)):
        with np.load(runs["npz"] / f"shard-00000{k}.npz") as shard:
            assert set(shard) == {"samples", "label", "even"}
            x = shard["samples"]
        pixels = np.clip((x + 1) / 2, 0, 1) * 255
        with np.load(runs["bytes"] / f"shard-00000{k}.npz") as shard:
            assert shard["samples"].dtype == np.uint8
            assert np.abs(shard["samples"] - pixels).max() <= 0.501
            pictures = shard["samples"]
        said = json.loads((runs["png"] / f"shard-00000{k}" / "labels.json").read_text())
        for name, ending in (("tar", "npy"), ("pictures", "png")):
            with tarfile.open(runs[name] / f"shard-00000{k}.tar") as archive:
                members = {m.name: archive.extractfile(m).read() for m in archive}
                assert {(m.mtime, m.uid, m.mode) for m in archive} == {(0, 0, 0o644)}
            keys = [f"{first + i:09d}.{e}" for i in range(n) for e in (ending, "cls", "json")]
            assert list(members) == keys
            for i in range(n):
                key = f"{first + i:09d}"
                assert members[f"{key}.cls"] == str(first + i).encode()
                assert json.loads(members[f"{key}.json"]) == {"even": i % 2 == 0}
                assert said[f"{key}.png"] == {"label": first + i, "even": i % 2 == 0}
                content = members[f"{key}.{ending}"]
                if ending == "npy":
                    assert np.array_equal(np.load(io.BytesIO(content)), x[i])
                else:
                    assert np.array_equal(
                        np.asarray(Image.open(io.BytesIO(content))), pictures[i, 0]
                    )
                    file = runs["png"] / f"shard-00000{k}" / f"{key}.png"
                    assert file.read_bytes() == content
    with zipfile.ZipFile(runs["npz"] / "shard-000000.npz") as archive:
        assert {m.date_time for m in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4, 5), (2, 4, 4)])
def test_any_shape_and_no_conditions(tmp_path, shape):
    model = fs.Denoiser(lambda x, t: x, fs.Flow(), "flow")
    there = generate(model, 3, tmp_path / "a", shape=shape, nfe=2, format="npz")
    with np.load(there[0]) as shard:
        assert shard["samples"].shape == (3, *shape)
        x = shard["samples"]
    (file,) = generate(model, 3, tmp_path / "b", shape=shape, nfe=2, format="tar")
    with tarfile.open(file) as archive:
        assert np.array_equal(
            np.load(io.BytesIO(archive.extractfile("000000002.npy").read())), x[2]
        )
    with pytest.raises(ValueError, match="is no picture"):
        generate(model, 3, tmp_path / "c", shape=shape, nfe=2, format="png", pixels=PIXELS)


def test_colours_keep_their_channels(tmp_path):
    model = fs.Denoiser(lambda x, t: x, fs.Flow(), "flow")
    args: dict[str, Any] = {"shape": (3, 4, 5), "nfe": 2, "pixels": (-4, 4)}
    (shard,) = generate(model, 2, tmp_path / "a", **args)
    (folder,) = generate(model, 2, tmp_path / "b", **args, format="png")
    picture = np.asarray(Image.open(folder / "000000001.png"))
    assert np.array_equal(picture, np.load(shard)["samples"][1].transpose(1, 2, 0))


def test_checksums_are_those_of_the_files(tmp_path):
    for format, pixels in (("npz", None), ("png", PIXELS)):
        out = tmp_path / format
        generate(digits(), 6, out, **SETTINGS, format=format, pixels=pixels)
        files = contents(out)
        lines = files.pop("SHA256SUMS").decode().splitlines()
        del files["manifest.json"]
        assert dict(line.split("  ")[::-1] for line in lines) == {
            name: hashlib.sha256(content).hexdigest() for name, content in files.items()
        }


def test_threads_of_the_caller_do_not_matter_and_are_as_before(tmp_path):
    before = torch.get_num_threads()
    generate(digits(), 8, tmp_path / "a", **SETTINGS)
    try:
        torch.set_num_threads(2)
        generate(digits(), 8, tmp_path / "b", **SETTINGS)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# What is refused ----------------------------------------------------------------------------------


def test_another_job_in_the_same_folder_is_refused_with_what_differs(tmp_path):
    out = tmp_path / "out"
    generate(digits(), 6, out, **SETTINGS)
    before = contents(out)
    for name, value in {
        "nfe": 4, "seed": 1, "shard": 3, "batch": 2, "threads": 2, "solver": "ddim",
        "grid": "karras", "pixels": PIXELS, "shape": (1, 8, 8, 1), "cond": {"label": [1, 2]},
        "format": "tar",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"belongs to another job.*{name} is "):
            generate(digits(), 6, out, **{**SETTINGS, name: value})
    with pytest.raises(ValueError, match="count is 6 there and 7 here"):
        generate(digits(), 7, out, **SETTINGS)
    other = fs.models.load("digits")
    with torch.no_grad():
        other.network.leave.bias[3] += 1e-6
    with pytest.raises(ValueError, match="weights is another"):
        generate(fs.Guided(other, 1.5, {"label": 10}), 6, out, **SETTINGS)
    with pytest.raises(ValueError, match="uncond is another"):
        generate(fs.Guided(fs.models.load("digits"), 1.5, {"label": 9}), 6, out, **SETTINGS)
    with pytest.raises(ValueError, match=r'guidance is .*"scale": 1.5.* there and .*"scale": 2'):
        generate(fs.Guided(fs.models.load("digits"), 2, {"label": 10}), 6, out, **SETTINGS)
    assert contents(out) == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"has 'letter.txt' and no manifest.json"):
        generate(digits(), 6, tmp_path, **SETTINGS)
    (tmp_path / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(ValueError, match="is none of fewstep generate"):
        generate(digits(), 6, tmp_path, **SETTINGS)
    assert set(contents(tmp_path)) == {"letter.txt", "manifest.json"}


def test_another_machine_goes_on_and_says_so(tmp_path):
    out = tmp_path / "out"
    generate(digits(), 6, out, **SETTINGS)
    file = out / "manifest.json"
    file.write_text(file.read_text().replace(torch.__version__, "1.0"))
    (out / "shard-000000.npz").unlink()
    with pytest.warns(UserWarning, match='torch is "1.0" there and'):
        generate(digits(), 6, out, **SETTINGS)
    assert (out / "shard-000000.npz").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shard": 0}, "shard = 0; need"),
        ({"batch": 1.5}, "batch = 1.5; need"),
        ({"threads": True}, "threads = True; need"),
        ({"format": "zip"}, "format = 'zip' is not known"),
        ({"format": "png"}, "pixels is missing"),
        ({"pixels": (1, 1)}, "pixels = .*; need"),
        ({"shape": (0, 2)}, "shape = .*; need"),
        ({"seed": [1, 2]}, "seed = .*; need one"),
        ({"seed": -1}, "seed = -1; need"),
        ({"cond": 3}, "cond = 3; give"),
        ({"cond": {"label": [1, 2], "b": [1]}}, "label has 2, b has 1 entries"),
        ({"path": True}, "path: .* draws no noise"),
        ({"nfe": 0}, "nfe = 0; need"),
    ],
)
def test_bad_arguments(tmp_path, change, said):
    with pytest.raises(ValueError, match=said):
        generate(digits(), 6, tmp_path / "out", **{**SETTINGS, **change})
    assert not (tmp_path / "out").exists()


def test_a_network_is_not_a_model(tmp_path):
    for network in (torch.nn.Linear(2, 2), lambda x, t: x, 3):
        with pytest.raises(ValueError, match="wrap your network"):
            generate(network, 2, tmp_path / "out", shape=(2,), nfe=2)  # pyright: ignore
    with pytest.raises(ValueError, match="count = 0; need"):
        generate(digits(), 0, tmp_path / "out", **SETTINGS)


def test_a_missing_extra_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "fewstep\[ray\]"'):
        generate(digits(), 6, tmp_path / "out", **SETTINGS, ray=2)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'pip install "fewstep\[cli\]"'):
        generate(digits(), 6, tmp_path / "out", **SETTINGS, format="png", pixels=PIXELS)


# What goes wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "pixels"), [("npz", None), ("tar", None), ("png", PIXELS)])
def test_a_network_that_breaks_leaves_complete_shards_alone(tmp_path, format, pixels):
    calls = []

    def network(x, t):
        calls.append(1)
        return x * (float("nan") if len(calls) > 8 else 0.5)  # 2 x 3 in the first shard

    model = fs.Denoiser(network, fs.VP())
    args = {**SETTINGS, "cond": None, "format": format, "pixels": pixels}
    with pytest.raises(FloatingPointError, match="samples 4 to 6: network returned NaN"):
        generate(model, 10, tmp_path / "out", **args)
    names = {p.name.split(".")[0] for p in (tmp_path / "out").iterdir()}
    assert names == {"manifest", "shard-000000"}
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize(("format", "pixels"), [("npz", None), ("tar", None), ("png", PIXELS)])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half(tmp_path, format, pixels):
    model = fs.Denoiser(lambda x, t: x * 0.5, fs.VP())
    args = {"shape": (128, 128), "nfe": 2, "shard": 2, "format": format, "pixels": pixels}
    generate(model, 2, tmp_path / "first", **args)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: shard 0 is not written; the same"):
            generate(model, 2, tmp_path / "out", **args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert set(contents(tmp_path / "out")) == {"manifest.json"}
    assert len(list((tmp_path / "out").iterdir())) == 1
    generate(model, 2, tmp_path / "out", **args)
    assert contents(tmp_path / "out") == contents(tmp_path / "first")


def test_a_folder_that_cannot_be_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="the folder cannot be used"):
        generate(digits(), 6, tmp_path / "file" / "out", **SETTINGS)


# Kills --------------------------------------------------------------------------------------------

# A process that imports once and forks a child for every run. Its children can be told to kill
# themselves at the n-th event: a network call, or just before or after data, names or a rename
# reach the disk.
FORKS = """
import os, signal, sys, time, torch
torch.set_num_threads(1)
import fewstep as fs
from fewstep import _generate as g

for name in ("ray", "PIL", "typer"):
    assert name not in sys.modules, f"{name} is imported before it is needed"

def child(out, format, last, delay):
    pixels = (-1, 1) if format == "png" else None
    count = 0
    def event():
        nonlocal count
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
    def watched(function):
        def call(*arguments):
            event()
            function(*arguments)
            event()
        return call
    g.os.fsync, g.os.replace = watched(os.fsync), watched(os.replace)
    def network(x, t):
        event()
        time.sleep(delay)
        return x.tanh()
    model = fs.Denoiser(network, fs.VP())
    g.generate(model, 10, out, shape=(8, 8), nfe=2, shard=4, batch=3, format=format, pixels=pixels,
               progress=False)
    return count

for line in sys.stdin:
    out, format, last, delay, after = line.split()
    pid = os.fork()
    if not pid:
        try:
            print("done", child(out, format, int(last), float(delay)), flush=True)
            os._exit(0)
        except BaseException as error:
            print("error", repr(error), flush=True)
            os._exit(1)
    if after != "None":
        time.sleep(float(after))
        os.kill(pid, signal.SIGKILL)  # not reaped yet: the number is still its own
    _, status = os.waitpid(pid, 0)
    print("status", os.waitstatus_to_exitcode(status), flush=True)
"""


class Forks:
    def __init__(self, script: Path) -> None:
        script.write_text(FORKS)
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self, out: Path, format: str, last: int = -1, delay: float = 0, after: float | None = None
    ) -> tuple[int, int]:
        """The exit status, and the number of events of a run that came to its end. last: the event
        at which it kills itself. delay: of a network call. after: seconds until it is killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{out} {format} {last} {delay} {after}\n")
        self.process.stdin.flush()
        events = 0
        while True:
            word, *rest = self.process.stdout.readline().split()
            if word == "status":
                return int(rest[0]), events
            assert word != "error", rest
            if word == "done":
                events = int(rest[0])


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    made = Forks(tmp_path_factory.mktemp("forks") / "forks.py")
    yield made
    made.process.communicate()
    assert made.process.returncode == 0


def check_so_far(out: Path, whole: dict[str, bytes]) -> None:
    """What has a final name is what it should be."""
    for name, content in contents(out).items() if out.exists() else ():
        if ".part" not in name:
            assert content == whole[name], name


@pytest.mark.parametrize(
    ("format", "stride"),
    [("npz", 4), *(pytest.param(f, 1, marks=pytest.mark.slow) for f in ("npz", "tar", "png"))],
)
def test_killed_at_every_place_where_something_reaches_the_disk(tmp_path, forks, format, stride):
    status, events = forks.run(tmp_path / "whole", format)
    assert status == 0
    assert events > 30
    whole = contents(tmp_path / "whole")
    for k in range(stride // 2, events, stride):
        out = tmp_path / f"out{k}"
        assert forks.run(out, format, last=k)[0] == -signal.SIGKILL
        check_so_far(out, whole)
        assert forks.run(out, format)[0] == 0
        assert contents(out) == whole


@pytest.mark.parametrize(
    ("format", "kills"),
    [("npz", 3), *(pytest.param(f, 20, marks=pytest.mark.slow) for f in ("npz", "tar", "png"))],
)
def test_killed_at_random_times(tmp_path, forks, format, kills):
    random = np.random.default_rng(kills)
    forks.run(tmp_path / "whole", format)
    whole, out = contents(tmp_path / "whole"), tmp_path / "out"
    killed = 0
    while killed < kills:
        after = random.uniform(0, 0.2)
        status, _ = forks.run(out, format, delay=0.02, after=after)
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
        check_so_far(out, whole)
        if status == 0:
            assert contents(out) == whole
            out = tmp_path / f"out{killed}"
    assert forks.run(out, format)[0] == 0
    assert contents(out) == whole


@pytest.mark.slow
def test_the_command_killed_at_twenty_random_times(tmp_path):
    code = "from fewstep._cli import main; main()"
    options = "generate --count 3200 --shard 64 --batch 8 --nfe 16 --format tar --out"
    job = [sys.executable, "-c", code, *options.split()]
    subprocess.run([*job, str(tmp_path / "whole")], check=True)
    whole, out = contents(tmp_path / "whole"), tmp_path / "out"
    random, killed = np.random.default_rng(0), 0
    while killed < 20:
        known = sorted(out.iterdir()) if out.exists() else []
        process = subprocess.Popen([*job, str(out)], stderr=subprocess.DEVNULL)
        while process.poll() is None and (sorted(out.iterdir()) if out.exists() else []) == known:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.15))
        assert process.poll() is None, "the job is too short for so many kills"
        process.kill()
        process.wait()
        killed += 1
        check_so_far(out, whole)
    subprocess.run([*job, str(out)], check=True)
    assert contents(out) == whole


def test_what_is_missing_is_made_again_and_what_is_left_is_cleaned(tmp_path):
    out = tmp_path / "out"
    generate(digits(), 10, out, **SETTINGS)
    whole = contents(out)
    (out / "shard-000001.npz").unlink()
    (out / "shard-000001.npz.123.part").write_bytes(b"half")
    (out / "manifest.json.123.part").write_bytes(b"half")
    kept = (out / "shard-000000.npz").stat().st_mtime_ns
    generate(digits(), 10, out, **SETTINGS)
    assert contents(out) == whole
    assert (out / "shard-000000.npz").stat().st_mtime_ns == kept


def test_a_process_without_words_for_itself_is_known_again(tmp_path):
    class Mine(fs.Flow):
        __repr__ = object.__repr__

    processes = [Mine(), Mine()]
    assert repr(processes[0]) != repr(processes[1])  # their addresses
    for process in processes:
        model = fs.Denoiser(lambda x, t: x, process, "flow")
        generate(model, 2, tmp_path / "out", shape=(2,), nfe=2)


# Processes ----------------------------------------------------------------------------------------


def test_any_number_of_processes_in_any_order_makes_the_same(tmp_path, monkeypatch):
    generate(digits(), 26, tmp_path / "one", **SETTINGS)
    out = tmp_path / "out"
    for rank, world, made in ((2, 3, "25"), (1, 2, "1235"), (0, 1, "0123456")):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        there = generate(digits(), 26, out, **SETTINGS)
        assert [p.name[11] for p in there] == list(made)
        assert (out / "SHA256SUMS").exists() == (world == 1)
    assert contents(out) == contents(tmp_path / "one")


TORCHRUN = """
import sys, torch
from fewstep._generate import generate
sys.path.insert(0, {here!r})
from test_generate import SETTINGS, digits
if "alone" not in sys.argv:
    torch.distributed.init_process_group("gloo")
there = generate(digits(), 26, sys.argv[1], **SETTINGS)
if "alone" not in sys.argv:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_torchrun_makes_the_same(tmp_path, world):
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN.format(here=str(Path(__file__).parent)))
    env = {**os.environ, "OMP_NUM_THREADS": "2"}  # torchrun's default is 1
    command = [sys.executable, str(script), str(tmp_path / "one"), "alone"]
    subprocess.run(command, check=True, env=env)
    env.pop("OMP_NUM_THREADS")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, f"--nproc-per-node={world}", str(script), str(tmp_path / "many")]
    subprocess.run(command, check=True, env=env, capture_output=True)
    assert contents(tmp_path / "many") == contents(tmp_path / "one")


def ray_processes() -> set[str]:
    """Processes of Ray, defunct ones left out."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"raylet" in line or b"gcs_server" in line or line.startswith(b"ray::"):
            found.add(folder.name)
    return found


RAY = """
import sys
import fewstep as fs
from fewstep._generate import generate
sys.path.insert(0, {here!r})
from test_generate import SETTINGS

def make():
    return fs.Guided(fs.models.load("digits"), 1.5, {{"label": 10}})

generate(make, 26, sys.argv[1], **SETTINGS, ray=2)
try:
    generate(make, 26, sys.argv[1], **dict(SETTINGS, seed=1), ray=2)
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_ray_makes_the_same_and_leaves_nothing_behind(tmp_path):
    pytest.importorskip("ray.data")
    before = ray_processes()
    script = tmp_path / "script.py"
    script.write_text(RAY.format(here=str(Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "ray")],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "belongs to another job: seed is 0 there and 1 here" in done.stdout
    generate(digits(), 26, tmp_path / "one", **SETTINGS)
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    deadline = time.monotonic() + 20
    while ray_processes() - before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not ray_processes() - before


# The command --------------------------------------------------------------------------------------


def test_the_command(tmp_path):
    from typer.testing import CliRunner

    from fewstep._commands import app

    def call(options: str, out: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["generate", *options.split(), "--out", str(tmp_path / out)])
        assert done.exit_code == code, done.output
        return str(done.exception) if done.exception else done.output

    said = call("--count 20 --shard 8 --nfe 3 --class 3,5 --seed 2", "a")
    assert said.endswith("a: 3 of 3 shards\n")
    label = {"label": torch.tensor([3, 5])}
    args: dict[str, Any] = {**SETTINGS, "shard": 8, "batch": 64, "cond": label, "seed": 2}
    generate(digits(), 20, tmp_path / "b", **args)
    for k in range(3):
        name = f"shard-00000{k}.npz"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    fs.plan("ddim", digits(), 4).save(tmp_path / "plan")
    call(f"--count 3 --plan {tmp_path / 'plan'} --format png", "c")
    assert len(list((tmp_path / "c").rglob("*.png"))) == 3
    assert json.loads((tmp_path / "c" / "manifest.json").read_text())["job"]["pixels"] == [-1, 1]
    assert "nfe is fixed" in call(f"--count 3 --plan {tmp_path / 'plan'} --nfe 3", "d", 1)
    assert "seed is 2 there and 0 here" in call("--count 20 --shard 8 --nfe 3 --class 3,5", "a", 1)
    assert "has its own" in call("--count 3 --shape 3x3", "d", 1)
    assert "pixels = a" in call("--count 3 --pixels a", "d", 1)


def test_the_command_samples_your_own_model(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from fewstep._commands import app

    monkeypatch.chdir(tmp_path)
    Path("a_model_of_mine.py").write_text(
        "import fewstep as fs\ndef make():\n    return fs.Denoiser(lambda x, t: x / 2, fs.VP())\n"
    )
    options = ["--model=a_model_of_mine:make", "--count=5", "--nfe=2", "--out=out", "--format=tar"]
    done = CliRunner().invoke(app, ["generate", *options, "--shape", "3x4"])
    assert done.exit_code == 0, done.output
    with tarfile.open("out/shard-000000.tar") as archive:
        assert np.load(io.BytesIO(archive.extractfile("000000004.npy").read())).shape == (3, 4)
    done = CliRunner().invoke(app, ["generate", *options])
    assert "shape is missing" in str(done.exception)
    done = CliRunner().invoke(app, ["generate", *options, "--shape", "3x4", "--guidance", "2"])
    assert "guidance = 2.0 is for bundled models" in str(done.exception)
