"""The site of the documents builds without a warning, is whole, and asks nothing of the network."""

from __future__ import annotations

import functools
import html.parser
import http.server
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import fewstep as fs

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")
pytest.importorskip("latex2mathml")

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
CHROMIUM += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


class _Page(html.parser.HTMLParser):
    """The places of a page that can be linked to, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.places: list[str] = []
        self.loaded: list[str] = []
        self.formulas = 0
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = {k: v or "" for k, v in attrs}
        self.places += [of["id"]] if "id" in of else []
        self.formulas += tag == "math"
        if tag in ("img", "script", "iframe", "source", "video", "embed") and "src" in of:
            self.loaded.append(of["src"])
        if tag == "link" and of.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(of["href"])


def test_every_public_name_has_its_place(site):
    places = [p for page in (site / "api").glob("*.html") for p in _Page(page).places]
    names = [f"fewstep.{n}" for n in [*fs.__all__, "deepinv", "diffusers", "k_diffusion"]]
    assert [n for n in names if places.count(n) != 1] == []


def test_formulas_are_mathml(site):
    assert _Page(site / "mathematics.html").formulas > 50
    for page in site.rglob("*.html"):
        assert 'class="arithmatex"' not in page.read_text(), page


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        for address in _Page(page).loaded:
            assert not re.match(r"(\w+:)?//", address), f"{page.name}: {address}"
    for style in site.rglob("*.css"):
        found = re.findall(r"(?:@import|url\()\s*[\"']?((?:\w+:)?//[^\"')]*)", style.read_text())
        assert not found, f"{style.name}: {found}"


def test_no_page_names_a_place_on_this_machine(site):
    for page in site.rglob("*.html"):
        assert str(ROOT) not in page.read_text(), page


def test_a_browser_shows_it(site):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium")
    api = pytest.importorskip("playwright.sync_api")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}/"
    wrong: list[str] = []
    try:
        with api.sync_playwright() as play:
            chromium = play.chromium.launch(executable_path=browser, args=CHROMIUM)
            shown = chromium.new_context()
            shown.set_default_timeout(180_000)  # machines may be busy
            for width in (1280, 400):
                page = shown.new_page()
                page.set_viewport_size({"width": width, "height": 900})
                page.on(
                    "request", lambda r: None if r.url.startswith(base) else wrong.append(r.url)
                )
                page.on("console", lambda m: m.type == "error" and wrong.append(m.text))
                for path in ("index.html", "mathematics.html", "api/plans.html"):
                    page.goto(base + path)
                    size = page.evaluate("document.documentElement.scrollWidth")
                    assert size <= width, f"{path} is {size} wide of {width}"
                    heights = page.evaluate(
                        "[...document.querySelectorAll('math')]"
                        ".map(m => m.getBoundingClientRect().height)"
                    )
                    assert all(h > 5 for h in heights)
                page.close()
            page = shown.new_page()
            page.goto(base + "index.html")
            page.fill("input.md-search__input", "calibrate")
            page.wait_for_selector(".md-search-result__item")
            chromium.close()
    finally:
        server.shutdown()
        server.server_close()
    assert [w for w in wrong if not w.startswith("data:")] == []
