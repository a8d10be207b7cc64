"""The report page: complete in itself, right in its numbers, readable in a browser, on a phone and by keyboard."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from shared.report.__main__ import MOST_POINTS, build, chart, main, over_seeds, thin
from shared.report.plots import image_grid, svg_chart
from tests.shared.programs import one_line_error, run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--virtual-time-budget=5000")
# Run inside the page: how wide it is, and what the keyboard reaches.
PROBE = """<script>addEventListener("load", () => {
  const reached = [...document.querySelectorAll("a[href], summary, [tabindex]")].filter(
    element => { element.focus(); return document.activeElement === element; }).length;
  const wanted = [...document.querySelectorAll("a[href], summary, .wide")].filter(
    element => element.checkVisibility()).length;
  document.documentElement.dataset.found = JSON.stringify({
    page: document.documentElement.scrollWidth, window: innerWidth, reached, wanted,
    open: document.querySelectorAll("details").length,
    images: [...document.images].every(image => image.complete && image.naturalWidth > 0)});
});</script>"""
# The window of a browser without a screen is not narrower than 500 pixels; a frame is.
FRAME = """<iframe style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe><script>
addEventListener("load", () => {{ document.documentElement.dataset.found =
  document.querySelector("iframe").contentDocument.documentElement.dataset.found; }});</script>"""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A run of a trainer, a table, and a picture, below one folder."""
    trained = tmp_path / "runs" / "first"
    trained.mkdir(parents=True)
    lines = [{"step": step, "loss": 1 / (1 + step), "eval/top-1-acc": step / 100, "timestamp": 1e9}
             for step in range(90)]
    lines[40]["loss"] = float("nan")
    (trained / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 90, "lo')
    (trained / "result.json").write_text(json.dumps({
        "accuracy": {"last": 0.875, "best_on_test": 0.9, "best_on_validation": None}, "seconds": 12.5,
        "classes": ["cat", "<dog>"], "confusion_matrix": [[7, 1], [0, 8]]}))
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 8, 8), np.uint8)
    image_grid({"cat": pixels}, trained / "generated.png")
    table = tmp_path / "runs" / "table"
    run("tests/shared/small_tables.py", "small", f"--out={table}", "--seeds=2", "--only=plain")
    return tmp_path / "runs"


@pytest.fixture
def page(runs: Path) -> str:
    main([str(runs), "--out", str(runs / "report.html")])
    return (runs / "report.html").read_text()


class Tags(HTMLParser):
    """Checks that every tag is closed in order, and gathers attributes."""
    VOID = {"meta", "img", "br", "wbr", "link", "path", "polyline", "circle"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def test_the_page_is_whole(page: str) -> None:
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    names = [name for name, _ in tags.seen]
    assert "script" not in names and "link" not in names
    # Nothing is loaded from elsewhere: every address is inside the page.
    addresses = [value for _, attributes in tags.seen for key, value in attributes.items() if key in ("src", "href")]
    assert all(value.startswith(("#", "data:image/png;base64,", "data:image/svg+xml;base64,")) for value in addresses)
    anchors = {attributes["id"] for _, attributes in tags.seen if "id" in attributes}
    assert {value[1:] for value in addresses if value.startswith("#")} <= anchors
    assert all(attributes.get("alt") for name, attributes in tags.seen if name == "img")


def test_the_numbers(page: str) -> None:
    assert "<td>87.50</td>" in page and "<td>90.00</td>" in page  # accuracy by protocol
    assert "1.50 ± 0.71\nprinted 2.00 ± 0.50\n-1.0 sd" in page and "not run\nprinted 3.00" in page
    assert "&lt;dog&gt;" in page and "<dog>" not in page
    assert 'alt="loss over step, from 0.01111 to 1; last: first 0.01111"' in page
    assert "timestamp" not in page.replace("timestamp</th>", "")


def test_gaps_where_a_value_is_not_finite() -> None:
    drawn = svg_chart({"a": ([0, 1, 2, 3, 4], [1, 2, float("nan"), 2, 1])}, "loss", "step")
    line = next(path for path in re.findall(r'<path d="([^"]*)"[^>]*stroke: #0072b2', drawn) if path.count("L") > 1)
    assert line.count("M") == 2
    assert chart("loss", {"a": ([0], [float("inf")])}, "step") == []


def test_many_lines_are_averaged_over_seeds() -> None:
    lines = {f"t/{name}/seed_{seed}/run": ([0.0, 1.0], [seed, 2.0 * seed]) for name in "ab" for seed in (1, 2)}
    lines["t/a/seed_3/run"] = ([0.0], [9.0])  # other steps
    assert over_seeds(lines) == {"t/a, mean of 2": ([0.0, 1.0], [1.5, 3.0]), "t/b, mean of 2": ([0.0, 1.0], [1.5, 3.0]),
                                 "t/a/seed_3/run": ([0.0], [9.0])}


@pytest.mark.parametrize("count", [1, 2, MOST_POINTS, 10_001])
def test_long_curves_keep_their_last_point(count: int) -> None:
    values = thin(list(range(count)))
    assert len(values) <= MOST_POINTS + 1 and values[0] == 0 and values[-1] == count - 1
    assert values == sorted(set(values))


def test_tables_of_papers_come_before_their_many_runs(runs: Path) -> None:
    for seed in range(12):
        folder = runs / "table" / f"method_a/seed_{seed}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"accuracy": {"last": 0.5}}))
    text = build([runs], "all")
    assert text.index("<h2>table/small-paper</h2>") < text.index("<h2>Results</h2>")
    assert "<details><summary>Accuracy of every run</summary>" in text
    assert "table/<wbr>method_<wbr>a/<wbr>seed_<wbr>11" in text  # may be broken where a phone is narrow


def test_bad_input(tmp_path: Path) -> None:
    assert "is not a folder" in one_line_error(run("shared/report/__main__.py", tmp_path / "none", status=2))
    assert "holds none of" in one_line_error(run("shared/report/__main__.py", tmp_path, status=2))
    (tmp_path / "result.json").write_text("{")
    assert "damaged" in one_line_error(run("shared/report/__main__.py", tmp_path, f"--out={tmp_path}/r.html", status=2))
    assert not (tmp_path / "r.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: the page was not opened in a browser "
                    "(Debian's package chromium is enough; .ci/run installs it)")
@pytest.mark.parametrize("width", [1200, 390])
def test_in_a_browser(page: str, tmp_path: Path, width: int) -> None:
    """It is no wider than the window, every link, summary and wide table can be reached by Tab, pictures are shown."""
    probed = tmp_path / "probed.html"
    probed.write_text(FRAME.format(width=width, page=escape(page.replace("</body>", PROBE + "</body>"))))
    done = subprocess.run([CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,900",
                           "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(re.search(r'data-found="([^"]*)"', done.stdout).group(1).replace("&quot;", '"'))
    assert found["page"] <= found["window"] == width
    assert found["reached"] == found["wanted"] > 5
    assert found["images"] and found["open"] >= 3
