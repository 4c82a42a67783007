"""The page in a browser: what a person does with it, from a file, without a network."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from itertools import pairwise
from math import log10
from pathlib import Path
from typing import Any

import pytest
from fabricated import AWKWARD, NFES, comparison

from fewstep._compare._report import page as make_page

playwright = pytest.importorskip(
    "playwright.sync_api", reason="the page is tested with playwright: pip install playwright"
)
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the page is tested with Chromium: none")

COMPARED = [
    comparison("digits"),
    comparison("points", frechet=False, pictures=(), seed=1, diverges=False),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    options += " --disable-background-networking --disable-component-update"
    with playwright.sync_playwright() as p:
        found = p.chromium.launch(executable_path=CHROMIUM, args=options.split())
        yield found
        found.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("page") / "index.html"
    file.write_text(make_page(COMPARED), encoding="utf-8")
    return file


@pytest.fixture
def page(browser: Any, path: Path) -> Iterator[Any]:
    """The page, opened; it must complain of nothing and ask for nothing but itself."""
    shown = browser.new_page(viewport={"width": 1280, "height": 900})
    said, asked = [], []
    shown.on("console", lambda m: said.append(m.text))
    shown.on("pageerror", lambda e: said.append(str(e)))
    shown.on("dialog", lambda d: (said.append(d.message), d.dismiss()))
    shown.on("request", lambda r: asked.append(r.url))
    shown.goto(path.as_uri())
    yield shown
    shown.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:image/png")] == [path.as_uri()]


def column(page: Any, key: str) -> list[str]:
    """Text of a column of the table; of estimates without the interval."""
    index = page.locator("#table th").evaluate_all(
        "(cells, key) => cells.findIndex((c) => c.dataset.key === key)", key
    )
    return page.locator("#table tbody tr").evaluate_all(
        """(rows, i) => rows.map((row) => {
            const cell = row.cells[i].cloneNode(true);
            cell.querySelector("small")?.remove();
            return cell.textContent;
        })""",
        index,
    )


def value(text: str) -> float:
    return float("inf") if "∞" in text else float(text.replace("−", "-").strip())


def rows(model: int = 0, nfe: int = 8) -> list[Any]:
    return COMPARED[model].at(nfe)


def test_it_opens_with_the_table_of_eight_evaluations(page: Any) -> None:
    assert column(page, "method") == [v.method for v in rows()]
    for key in ("median", "rms", "frechet"):
        shown = [value(v) for v in column(page, key)]
        assert shown == pytest.approx([getattr(v, key).value for v in rows()], rel=5e-3)
    best = [
        v.method for v, mark in zip(rows(), column(page, "standing"), strict=True) if mark == "best"
    ]
    assert best == [COMPARED[0].best(8).method]
    assert page.locator("#by-nfe li").count() == len(NFES)
    assert AWKWARD in page.locator("#about").inner_text()


def test_every_column_sorts_both_ways(page: Any) -> None:
    page.select_option("#nfe", "")
    lines = COMPARED[0].lines
    assert len(column(page, "nfe")) == len(lines)
    numbers = ("median", "ratio", "rms", "p90", "frechet", "sliced", "data")
    for key in (*numbers, "nfe", "method", "grid", "final", "kind", "standing"):
        head = page.locator(f"#table th[data-key={key}]")
        orders = []
        for _ in range(2):
            head.locator("button").press("Enter")
            orders.append(head.get_attribute("aria-sort"))
            shown = column(page, key)
            if key in numbers or key == "nfe":
                # Of the library's numbers, in its order: text would put 10 before 9.
                exact = sorted(
                    (getattr(v, key).value if key != "nfe" else v.nfe for v in lines),
                    reverse=orders[-1] == "descending",
                )
                assert [value(v) for v in shown] == pytest.approx(exact, rel=5e-3), key
            else:
                full = [v for v in shown if v]
                assert shown == full + [""] * (len(shown) - len(full))
                changes = sum(a != b for a, b in pairwise(full))
                assert changes == len(set(full)) - 1, key
        assert set(orders) == {"ascending", "descending"}
        assert page.locator("#table th:not([aria-sort=none])").count() == 1


def test_filters(page: Any) -> None:
    page.select_option("#nfe", "")
    page.select_option("#show", "best")
    assert sorted(map(int, column(page, "nfe"))) == list(NFES)
    page.select_option("#show", "tied")
    assert len(column(page, "nfe")) == sum(v.tied for v in COMPARED[0].lines)
    page.select_option("#show", "all")
    page.select_option("#kind", "recipe")
    assert set(column(page, "method")) == {"$learned_{plan}$"}
    assert page.locator("#chart .series").count() == 1
    page.select_option("#kind", "")
    page.fill("#text", "UNIPC karras")
    assert set(column(page, "method")) == {"unipc_2", "unipc_3"}
    assert set(column(page, "grid")) == {"karras"}
    page.fill("#text", "nothing is called so")
    assert column(page, "method") == []
    assert page.locator("#none").is_visible()
    page.fill("#text", "")
    page.select_option("#nfe", "20")
    assert column(page, "method") == [v.method for v in rows(nfe=20)]


def test_another_model(page: Any) -> None:
    """Without features and pictures: no columns, measures and samples of them."""
    assert page.locator("#samples-section").is_visible()
    page.select_option("#measure", "frechet")
    page.select_option("#model", "1")
    assert column(page, "method") == [v.method for v in rows(1)]
    assert page.locator("#samples-section").is_hidden()
    assert page.locator("th[data-key=frechet]").count() == 0
    options = page.locator("#measure option").evaluate_all("all => all.map((o) => o.value)")
    assert options == ["median", "rms", "p90", "sliced"]
    assert page.input_value("#measure") == "median"


def test_points_say_what_they_are(page: Any) -> None:
    for key in ("median", "sliced"):
        page.select_option("#measure", key)
        page.locator("#chart").scroll_into_view_if_needed()
        for method in ("unipc_3", "__proto__"):
            line = next(v for v in rows() if v.method == method)
            dots = page.locator("#chart .series").evaluate_all(
                """(all, method) => [...all.find((g) => g.dataset.method === method)
                    .querySelectorAll(".dot")].map((d) => d.getBoundingClientRect())
                    .map((b) => [b.x + b.width / 2, b.y + b.height / 2])""",
                method,
            )
            page.mouse.move(*dots[NFES.index(8)])
            tip = page.locator("#tip").inner_text()
            assert tip.startswith(method)
            assert f"{line.grid}, ends at {line.final}; NFE 8" in tip
            for part in (line.median, line.ratio, line.frechet, line.sliced):
                assert f"{part.value:#.3g} (".replace("-", "−") in tip
            assert f"{line.median.low:#.3g} to {line.median.high:#.3g}" in tip
    page.mouse.move(5, 5)
    assert page.locator("#tip").is_hidden()


def test_heights_of_points_are_the_numbers(page: Any) -> None:
    """On a logarithmic axis differences of heights are ratios."""
    at = page.locator("#chart .series").evaluate_all(
        """all => Object.fromEntries(all.map((g) => [g.dataset.method,
            [...g.querySelectorAll(".dot")].map((d) => d.getBoundingClientRect())
                .map((b) => b.y + b.height / 2)]))"""
    )
    errors = {m: [v.median.value for v in COMPARED[0].lines if v.method == m] for m in at}
    first, second = "ddim", "ipndm_2"  # grey circles
    decade = (at[first][-1] - at[first][1]) / log10(errors[first][1] / errors[first][-1])
    for k in range(len(NFES)):
        apart = decade * log10(errors[first][k] / errors[second][k])
        assert at[second][k] - at[first][k] == pytest.approx(apart, abs=1.5)


def test_a_chosen_method_is_marked_everywhere(page: Any) -> None:
    def chosen() -> set[str]:
        return set(
            page.locator("tr.on, .series.on, [aria-pressed=true]").evaluate_all(
                "all => all.map((n) => n.dataset.method)"
            )
        )

    assert chosen() == set()
    button = page.locator("#table button", has_text=AWKWARD)
    button.press("Enter")
    assert chosen() == {AWKWARD}
    assert page.locator("tr.on").count() == 1
    assert page.locator("#chart .series.on").count() == 1
    assert button.evaluate("b => b === document.activeElement")  # focus stays
    page.locator("#legend button").first.click()
    assert chosen() == {"$learned_{plan}$"}
    page.locator("#chart").focus()
    for key in ("ArrowRight", "ArrowLeft", "Enter"):  # the first key enters at the chosen method
        page.keyboard.press(key)
    assert chosen() == set()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    assert len(chosen()) == 1
    assert chosen() != {"$learned_{plan}$"}


def test_measures_change_chart_and_order(page: Any) -> None:
    before = page.locator("#chart").inner_html()
    for key, name in (
        ("sliced", "sliced Wasserstein distance"),
        ("data", "Fréchet distance to the data"),
    ):
        page.select_option("#measure", key)
        assert name in page.locator("#chart-title").inner_text()
        assert page.locator("#chart").inner_html() != before
        assert "converged samples" in page.locator("#chart").text_content()
        lines = sorted(rows(), key=lambda v: getattr(v, key).value)
        assert column(page, "method") == [v.method for v in lines]


def test_samples(page: Any) -> None:
    labels = page.locator("#samples .name").evaluate_all(
        "all => all.map((n) => n.firstChild.textContent)"
    )
    assert labels == ["converged", *(v.method for v in rows())]
    page.select_option("#nfe", "3")
    assert page.locator("#samples img").count() == 1 + len(rows(nfe=3))
    page.select_option("#nfe", "")
    page.locator("#table button", has_text="heun").first.click()
    labels = page.locator("#samples .name").evaluate_all(
        "all => all.map((n) => n.firstChild.textContent)"
    )
    assert labels == ["converged", *(f"NFE {n}" for n in NFES if n % 2 == 0)]
    sizes = page.locator("#samples img").evaluate_all("all => all.map((i) => i.naturalWidth)")
    assert set(sizes) == {4 * 8 + 3}


def test_what_was_skipped_is_said(page: Any) -> None:
    text = page.locator("#skipped").inner_text()
    assert text.count("heun takes two evaluations per step") == 3


def test_the_csv_can_be_had(page: Any) -> None:
    with page.expect_download() as waiting:
        page.click("#csv")
    assert waiting.value.suggested_filename == "numbers.csv"
    got = list(csv.DictReader(io.StringIO(Path(waiting.value.path()).read_text())))
    assert [r["method"] for r in got] == [v.method for c in COMPARED for v in c.lines]


def test_narrow_dark_and_printed(page: Any) -> None:
    def fits() -> bool:
        return page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.set_viewport_size({"width": 400, "height": 800})
    page.wait_for_selector("#chart[viewBox^='0 0 3']")  # drawn again, 376 wide
    assert fits()
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == light
    assert page.locator("#controls").is_hidden()
    assert page.locator("#scroll").evaluate("n => n.scrollHeight <= n.clientHeight")


def test_everything_that_acts_has_a_name(page: Any) -> None:
    """Names as assistive technology sees them; every picture, too."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    seen = set()
    for node in nodes:
        role = node.get("role", {}).get("value")
        if node.get("ignored") or role not in (
            "button", "link", "combobox", "searchbox", "textbox", "image", "application", "table",
            "region", "columnheader", "form", "option",
        ):  # fmt: skip
            continue
        seen.add(role)
        assert node.get("name", {}).get("value", "").strip(), node
    assert {"button", "link", "combobox", "searchbox", "image", "table", "columnheader"} <= seen


def test_colours_can_be_read(page: Any) -> None:
    """Text against the paper: contrast of at least 4.5 (WCAG AA), light and dark."""
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        worst = page.evaluate(
            """() => {
                const rgb = (c) => c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
                    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
                const weights = [0.2126, 0.7152, 0.0722];
                const light = (c) => rgb(c).reduce((s, v, i) => s + v * weights[i], 0);
                const paper = light(getComputedStyle(document.body).backgroundColor);
                const ratio = (c) => {
                    const [a, b] = [light(c), paper].sort((x, y) => y - x);
                    return (a + 0.05) / (b + 0.05);
                };
                const texts = "p, a, dt, dd, h1, h2, small, label, td, b";
                return Math.min(...[...document.querySelectorAll(texts)]
                    .map((n) => ratio(getComputedStyle(n).color)));
            }"""
        )
        assert worst >= 4.5, scheme
