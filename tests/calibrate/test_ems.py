"""The table of statistics: closed form, averages, files."""

import numpy as np
import pytest

import fewstep as fs
from fewstep._calibrate._ems import EMS

MEAN = np.array([[0.3, -1.0, 0.0], [2.0, 0.5, -0.2]])
STD = np.array([[0.2, 1.0, 3.0], [0.7, 0.05, 1.4]])


def table(size: tuple[int, ...] = (2, 3, 4), n: int = 5) -> EMS:
    rng = np.random.default_rng(1)
    lam = np.sort(rng.normal(size=n))
    return EMS(lam, *rng.normal(size=(3, n, *size)), {"made by": "a test"})


@pytest.mark.parametrize(
    "process", [fs.VP(), fs.EDM(), fs.Flow(), fs.DiscreteVP.linear()], ids=repr
)
def test_gaussian_is_the_definition(process: fs.Process):
    """l, and f' = s f + b, from D and the ODE y' = D - y alone."""
    ems = EMS.gaussian(process, STD, MEAN, count=9)
    assert ems.size == (2, 3)
    np.testing.assert_allclose(ems.lam[0], process.lam_start)
    np.testing.assert_allclose(ems.lam[-1], process.lam(process.t_end))

    def D(y, lam):
        return MEAN + STD**2 / (STD**2 + np.exp(-2 * lam)) * (y - MEAN)

    def f(y, lam):
        l = EMS.gaussian(process, STD, lam=[lam - 1, lam, lam + 1]).l[1]
        return (1 - l) * y - D(y, lam)

    h, y = 1e-5, np.random.default_rng(0).normal(size=(2, 3))
    for lam, l, s, b in zip(ems.lam, ems.l, ems.s, ems.b, strict=True):
        slope = (D(y + h, lam) - D(y - h, lam)) / (2 * h)
        np.testing.assert_allclose(l, 1 - slope, atol=1e-9)
        rate = D(y, lam) - y
        df = (f(y + h * rate, lam + h) - f(y - h * rate, lam - h)) / (2 * h)
        np.testing.assert_allclose(s * f(y, lam) + b, df, atol=1e-7)
        np.testing.assert_allclose(s, l - 1, atol=1e-15)


def test_gaussian_takes_numbers_and_levels():
    ems = EMS.gaussian(fs.EDM(), 0.5, count=11, lam=(-2, 3))
    assert ems.size == ()
    np.testing.assert_allclose(ems.lam, np.linspace(-2, 3, 11))
    assert not ems.b.any()
    far = EMS.gaussian(fs.EDM(), 0.5, lam=[-900.0, 0.0, 900.0])
    np.testing.assert_array_equal(far.l[[0, 2]], [1.0, 0.0])
    np.testing.assert_array_equal(far.s[[0, 2]], [0.0, -1.0])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"std": 0.0}, "std"),
        ({"std": [1.0, np.inf]}, "std"),
        ({"std": 1.0, "mean": np.nan}, "mean"),
        ({"std": np.ones(2), "mean": np.ones(3)}, "broadcast"),
        ({"std": 1.0, "count": 1}, "count"),
        ({"std": 1.0, "lam": (2, 1)}, "lam"),
        ({"std": 1.0, "lam": [0.0, 2.0, 1.0]}, "increasing"),
    ],
)
def test_gaussian_refuses(options: dict, word: str):
    with pytest.raises(ValueError, match=word):
        EMS.gaussian(fs.VP(), **options)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"lam": [0.0]}, "lam"),
        ({"lam": [0.0, 0.0, 1.0, 2.0, 3.0]}, "increasing"),
        ({"lam": [0.0, 1.0, 2.0, 3.0, np.inf]}, "lam holds nan or infinity"),
        ({"s": np.zeros((5, 2, 3))}, "s has shape"),
        ({"l": np.zeros((4, 2, 3, 4))}, "l has shape"),
        ({"b": np.full((5, 2, 3, 4), np.nan)}, "b holds nan"),
        ({"info": {"samples": 3}}, "info"),
    ],
)
def test_tables_are_checked(change: dict, word: str):
    good = table()
    parts = {k: getattr(good, k) for k in ("lam", "l", "s", "b", "info")}
    with pytest.raises(ValueError, match=word):
        EMS(**{**parts, **change})


def test_a_table_does_not_change():
    l = np.zeros((3, 2))
    ems = EMS(np.arange(3.0), l, l, l)
    l[:] = 1
    assert not ems.l.any()
    with pytest.raises(ValueError, match="read-only"):
        ems.s[:] = 1


def test_reductions_average():
    ems = table()
    assert ems.reduced("element") is ems
    channel, scalar = ems.reduced("channel"), ems.reduced("scalar")
    assert (channel.size, scalar.size) == ((2, 1, 1), ())
    for name in ("l", "s", "b"):
        full = getattr(ems, name)
        np.testing.assert_allclose(getattr(channel, name)[:, 1, 0, 0], full[:, 1].mean((1, 2)))
        np.testing.assert_allclose(getattr(scalar, name), full.mean((1, 2, 3)))
    np.testing.assert_allclose(channel.reduced("scalar").l, scalar.l)
    assert "channel" in channel.info["reduced to"]
    with pytest.raises(ValueError, match="did you mean 'scalar'"):
        ems.reduced("scalars")
    with pytest.raises(ValueError, match="axes"):
        table((4,)).reduced("channel")


@pytest.mark.parametrize("size", [(), (4,), (2, 3, 4)])
def test_files_keep_every_bit(tmp_path, size: tuple[int, ...]):
    ems = table(size)
    ems.save(tmp_path / "ems")
    back = EMS.load(tmp_path / "ems")
    for name in ("lam", "l", "s", "b"):
        assert getattr(back, name).tobytes() == getattr(ems, name).tobytes()
    assert back.info == ems.info
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ems"]


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "ems"
    table().save(path)
    content = path.read_bytes()
    for bad in (b"", b"abc", content[:-9], content[:40], b"\xff" * 200):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"ems.*readable"):
            EMS.load(path)
    fs.plan("ddim", fs.VP(), 3).save(path)
    with pytest.raises(ValueError, match=r"another kind.*fewstep\.plan"):
        EMS.load(path)
    path.write_bytes(content.replace(b'"lam"', b'"mal"'))
    with pytest.raises(ValueError, match="lam"):
        EMS.load(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        EMS.load(tmp_path / "none")
