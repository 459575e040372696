"""The report as a page: the same numbers as in the JSON, whole in itself.

A browser draws it without a fault.
"""

import html
import json
import re
import shutil
import struct
import subprocess
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import reports
from reports import NASTY, RECIPE, black_box, finished

from stillroom.pipeline.printing.numbers import percent
from stillroom.pipeline.report import html as report_html
from stillroom.pipeline.report import plots
from stillroom.pipeline.report.blocks import Figures, Page, Section, Table
from stillroom.pipeline.report.report import COMPARISON, load_report, page, show
from stillroom.stages.evaluate.by_class.confusion import Confusion
from stillroom.storage.errors import UsageError

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
LIMIT = 3_000_000


def whole() -> dict[str, Any]:
    """An evaluation with everything that a page can show."""
    return reports.evaluation() | {"views": reports.views(), "reliability": reports.reliability()}


def clocked() -> dict[str, Any]:
    facts = deepcopy(reports.facts())
    facts["stages"]["train"]["clock"] = {
        "start": 4.5,
        "model": 300.25,
        "tokenizer": 0.0,
        "disk": 12.5,
        "other": 3.0,
    }
    facts["stages"]["generate"] |= {"commits": {"number": 2, "first": 0, "last": 1}, "clock": None}
    return facts


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("page") / "run", whole(), clocked())


class Parsed(HTMLParser):
    """What a page holds: tables, ids, sections, addresses, scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.scripts: list[str] = []
        self.headings: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.ids += [i] if (i := named.get("id")) else []
        self.addresses += [
            str(v) for n, v in named.items() if n in ("src", "href", "xlink:href", "data", "action")
        ]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag == "script":
            self.scripts.append("")
        elif tag in ("h1", "h2"):
            self.headings.append("")
        if tag not in ("meta", "link", "wbr", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "th" in self.open or "td" in self.open:
            self.tables[-1][-1][-1] += data
        elif "script" in self.open:
            self.scripts[-1] += data
        elif {"h1", "h2"} & set(self.open):
            self.headings[-1] += data


def tables(content: Any) -> list[Table]:
    """All tables of a page's blocks, in the order in which they are drawn."""
    found: list[Table] = []
    for block in content:
        if isinstance(block, Table):
            found.append(block)
        elif isinstance(block, Section):
            found += tables(block.blocks)
        elif isinstance(block, Figures):
            found += tables(block.numbers)
    return found


def test_every_cell_of_the_page_is_a_cell_of_the_markdown_and_each_result_the_json_s(
    run: Path,
) -> None:
    parsed = Parsed((run / "report.html").read_text())
    markdown = (run / "report.md").read_text()
    plain = [
        [[re.sub(r"[`*]", "", cell) for cell in row] for row in t.rows]
        for t in tables(page(load_report(run)).sections)
    ]
    drawn = [[row for row in rows if row] for rows in parsed.tables]
    assert [rows[-len(p) :] for rows, p in zip(drawn, plain, strict=True)] == plain
    for table in tables(page(load_report(run)).sections):
        for row in table.rows:
            assert "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" in markdown
    results = json.loads((run / "report.json").read_text())["evaluation"]["results"]
    for row, name in zip(
        parsed.tables[0][1:], ("teacher", "student_before", "baseline", "student"), strict=True
    ):
        shown = [float(re.sub(r"[,%]|±.*", "", cell)) for cell in row[1:]]
        measures = ("cross_entropy", "kl_teacher", "acceptance", "top1_agreement", "ece")
        expected = [results[name][m] * (1 if m in measures[:2] else 100) for m in measures]
        assert shown[0:1] + shown[2:] == pytest.approx(expected, abs=0.051)


def test_what_a_token_s_box_shows_are_the_numbers_of_the_json(run: Path) -> None:
    parsed = Parsed((run / "report.html").read_text())
    shown, stated = json.loads(parsed.scripts[0]), reports.views()
    assert len(shown) == len(stated["rows"]) == 2
    for row, tokens in zip(stated["rows"], shown, strict=True):
        assert [token["t"] for token in tokens] == [NASTY[i] for i in row["token_ids"]]
        assert [token["i"] for token in tokens] == list(range(5, 35))
        for n, token in enumerate(tokens):
            assert list(token["v"]) == ["student", "baseline", "student_before"]
            for arm, party in row["arms"].items():
                assert float(token["said"][arm]["kl"]) == pytest.approx(party["kl"][n], abs=5.1e-4)
                assert float(token["said"][arm]["p"]) == pytest.approx(
                    party["token"][n], abs=5.1e-4
                )
            for party in ("teacher", "student"):
                best = row["teacher"] if party == "teacher" else row["arms"][party]
                assert [text for text, *_ in token["said"][party]["best"]] == [
                    NASTY[i] for i in best["ids"][n]
                ]
                assert [float(p) for _, p, _ in token["said"][party]["best"]] == pytest.approx(
                    best["probabilities"][n], abs=5.1e-4
                )


def test_the_page_is_whole_in_itself_and_no_text_breaks_it(run: Path) -> None:
    text = (run / "report.html").read_text()
    parsed = Parsed(text)
    assert parsed.open == []
    assert len(text.encode()) < LIMIT
    assert all(address.startswith(("#", "data:")) for address in parsed.addresses)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src 'none'" in text
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert "<b>" not in text.split("</style>")[1]
    assert len(parsed.scripts) == 2
    targets = {address[1:] for address in parsed.addresses if address.startswith("#")}
    assert targets <= set(parsed.ids)


def test_every_colour_that_is_drawn_with_is_given_in_light_and_in_dark(run: Path) -> None:
    text = (run / "report.html").read_text()
    used = set(re.findall(r"var\(--([\w-]+)\)", text)) - {"sans", "mono", "v", "p", "c", ""}
    light, dark = (
        set(re.findall(r"--([\w-]+):", part))
        for part in re.findall(r":root \{(.*?)\}", text, re.DOTALL)[:2]
    )
    assert {f"run-{n}" for n in range(6)} | {
        "start",
        "model",
        "disk",
        "student",
        "hot",
        "edge",
    } <= used | light
    assert used <= light | {"sans", "mono"}
    assert used - dark <= {"sans", "mono"}
    assert not re.search(r"#0000[0-9a-f]{2}\b", text), "a colour that stands for a variable is left"


def test_text_in_drawings_is_text_and_each_has_a_name(run: Path) -> None:
    text = (run / "report.html").read_text()
    drawings = re.findall(r"<svg .*?</svg>", text, re.DOTALL)
    titles = [re.search(r"<title>(.*?)</title>", drawing) for drawing in drawings]
    names = [html.unescape(title[1]) for title in titles]  # type: ignore[index]
    assert names == [
        "Loss",
        "Divergence",
        "Cross-entropy",
        "Learning rate",
        "KL to the teacher by position",
        "Reliability",
        "Mass kept (best 64)",
        "Mass of the best K entries",
        "Entropy of the teacher",
        "Lengths",
        "Where the time went",
    ]
    assert all(">nats/token<" in drawing for drawing in drawings[:3])
    assert all('role="img"' in drawing for drawing in drawings)


def headings(
    evaluation: dict[str, Any], recipe: dict[str, Any], folder: Path, facts: dict[str, Any]
) -> list[str]:
    text = (finished(folder, evaluation, facts, recipe) / "report.html").read_text()
    assert "<svg" not in text or "NaN" not in text
    assert not re.search(r"<(figure|ul|table|tbody|div class=\"figures\")[^>]*>\s*</", text), (
        "an empty frame"
    )
    return Parsed(text).headings[1:]


def test_what_is_not_known_leaves_no_empty_frame(tmp_path: Path) -> None:
    everything = headings(whole(), RECIPE, tmp_path / "whole", clocked())
    assert everything == [
        "Results",
        "What was run",
        "Training",
        "By position, and calibration",
        "Token by token",
        "Samples",
        "The held-out text",
        "Time and bytes",
        "Provenance",
    ]
    bare = black_box(reports.evaluation()) | {"samples": []}
    assert headings(bare, RECIPE | {"score": None}, tmp_path / "bare", {}) == [
        "Results",
        "What was run",
        "Training",
        "Provenance",
    ]
    without_teacher = reports.views() | {"rows": [], "pieces": {}}
    for name in ("entropy", "kept_mass", "mass_by_k"):
        del without_teacher[name]
    without_teacher["by_position"]["measure"] = "cross_entropy"
    bare |= {"views": without_teacher, "reliability": {"student": reports.reliability()["student"]}}
    found = headings(bare, RECIPE | {"score": None}, tmp_path / "black-box", {})
    assert found == [
        "Results",
        "What was run",
        "Training",
        "By position, and calibration",
        "The held-out text",
        "Provenance",
    ]


def test_texts_that_are_classified_have_their_own_page(tmp_path: Path) -> None:
    evaluation = reports.evaluation() | {"samples": [], "reliability": reports.reliability()}
    for arm in evaluation["results"].values():
        arm["accuracy"] = 0.9
    evaluation["measured_on"]["of"] = "texts"
    evaluation["views"] = {name: reports.views()[name] for name in ("lengths", "entropy")}
    found = headings(evaluation, RECIPE, tmp_path / "run", {})
    assert found == [
        "Results",
        "What was run",
        "Training",
        "Calibration",
        "The held-out text",
        "Provenance",
    ]


@pytest.mark.parametrize("classes", [3, 77])
def test_what_is_taken_for_what_is_a_matrix_of_few_classes_and_the_worst_pairs_of_many(
    tmp_path: Path, classes: int
) -> None:
    evaluation = reports.evaluation()
    evaluation["measured_on"] |= {"of": "texts", "rows": 300, "labelled": 240}
    confusion = Confusion()
    for n in range(240):  # of three texts of a class one is taken for the next class
        confusion.add(bytes([n]), n % classes, (n + (n // classes == 1)) % classes)
    arm = confusion.by_class(classes) | {"confusion": confusion.cells()}
    names = [f"class|{n}" for n in range(classes)]
    evaluation["classes"] = {"names": names, "arms": {"teacher": arm, "student": arm}}
    for results in evaluation["results"].values():
        results |= {"accuracy": results["top1_agreement"]} | confusion.results()
    run = finished(tmp_path / "run", evaluation, {})
    page, text = Parsed((run / "report.html").read_text()), (run / "report.md").read_text()
    (about,) = [table for table in page.tables if "macro recall" in table[0]]
    assert about[-1][3] == percent(
        confusion.results()["f1_macro"], error=confusion.results()["f1_macro_se"]
    )
    shown = [
        table
        for table in page.tables
        if table[0][0] == ("label, by answer" if classes == 3 else "label")
    ]
    assert len(shown) == 2  # the student's, and the teacher's behind its name
    if classes == 3:
        assert shown[0][1:] == [
            [names[n], *("79" if m == n else "1" if m == (n + 1) % 3 else "0" for m in range(3))]
            for n in range(3)
        ]
    else:
        assert len(shown[0]) == 21
        assert shown[0][1] == [names[0], names[1], "1", "25.0 %"]
    assert "of which 240 have a gold label" in text
    assert (run / "report.html").read_text().count("<summary>By class: teacher") == 1


def test_a_report_of_before_has_a_page_too(tmp_path: Path) -> None:
    run = finished(tmp_path / "run", reports.evaluation(), {})
    (run / "report.html").unlink()
    text, target, _ = show([run], None)
    assert target == run / "report.html"
    assert text == (run / "report.md").read_text()
    assert Parsed(target.read_text()).headings[1] == "Results"


def test_a_comparison_lies_where_it_is_asked_for_else_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = finished(tmp_path / "one", whole(), {})
    second = finished(
        tmp_path / "two", whole(), {}, RECIPE | {"score": {"targets": "topk", "k": 8}}
    )
    _, target, found = show([first, second], None)
    assert target == COMPARISON
    assert found["page"] == "comparison.html"
    drawn = Parsed((tmp_path / "comparison.html").read_text())
    assert drawn.headings == ["Comparison", "What differs", "Results", "Curves of the students"]
    assert drawn.tables[0][1] == ["score.k", "64", "8"]
    names = re.findall(r"<title>(.*?)</title>", (tmp_path / "comparison.html").read_text())[1:]
    assert names == [
        "Loss",
        "Divergence",
        "Cross-entropy",
        "Learning rate",
        "KL to the teacher by position",
    ]
    with pytest.raises(UsageError, match=r"is a folder\. Name a file with --out"):
        show([first, second], tmp_path)


def test_losses_of_classifiers_are_per_text_in_a_comparison_too(tmp_path: Path) -> None:
    evaluation = reports.evaluation() | {"samples": []}
    evaluation["measured_on"]["of"] = "texts"
    for arm in evaluation["results"].values():
        arm["accuracy"] = 0.9
    first = finished(tmp_path / "one", deepcopy(evaluation), {})
    second = finished(
        tmp_path / "two", evaluation, {}, RECIPE | {"score": {"targets": "topk", "k": 8}}
    )
    show([first, second], tmp_path / "both.html")
    drawn = (tmp_path / "both.html").read_text()
    assert ">nats/text<" in drawn
    assert "nats/token" not in drawn


def test_the_mass_that_topp_keeps_is_called_as_in_the_recipe(tmp_path: Path) -> None:
    evaluation = whole()
    single = struct.unpack("f", struct.pack("f", 0.95))[0]  # as rows have it
    evaluation["views"]["kept_mass"] |= {"kind": "topp", "p": single}
    drawn = (finished(tmp_path / "run", evaluation, {}) / "report.html").read_text()
    assert "Mass kept (topp, mass 0.95)" in drawn


def test_a_name_in_code_may_break_after_a_dot_and_marks_are_escaped() -> None:
    drawn = report_html.page(
        Page("a <b>", [], [Section("S", [Table(["", ""], [["`x.y_z`", "1 < 2 & **so**"]])])])
    )
    assert "<code>x.<wbr>y_<wbr>z</code>" in drawn
    assert "1 &lt; 2 &amp; <strong>so</strong>" in drawn
    assert "<title>a &lt;b&gt;</title>" in drawn


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (2e5, "200k"), (1.5e6, "1.5M"), (2e9, "2G"), (9.8e-4, "0.00098"), (2e-5, "2e-5")],
)
def test_numbers_on_axes_are_short(value: float, text: str) -> None:
    assert plots.short(value) == text


PROBE = """
<body style="margin:0"><pre id="found">nothing</pre><script>
addEventListener("message", (e) =>
  document.getElementById("found").textContent = JSON.stringify(e.data));
</script><iframe style="border:0;width:390px;height:844px" srcdoc="%s"></iframe></body>
"""
LOOK = """<script>
addEventListener("load", () => {
  const box = (e) => {
    const r = e.getBoundingClientRect();
    return [r.left, r.top, r.right, r.bottom];
  };
  const scroll = document.documentElement.scrollWidth;
  const found = { width: innerWidth, scroll, boxes: [], text: "" };
  const pop = document.getElementById("pop");
  for (const token of document.querySelectorAll(".t")) {
    token.dispatchEvent(new MouseEvent("click", { bubbles: true }));
    if (!pop.hidden) found.boxes.push(box(pop));
  }
  found.text = pop?.textContent;
  document.querySelector("input[value=baseline]")?.click();
  const first = [...document.querySelectorAll(".t")].slice(0, 3);
  found.shades = first.map((t) => t.style.getPropertyValue("--v"));
  parent.postMessage(found, "*");
});
</script></body>"""


@pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed: the page is not drawn by a browser"
)
def test_a_browser_draws_it_on_a_phone_without_an_error(run: Path, tmp_path: Path) -> None:
    text = (run / "report.html").read_text().replace("</body>", LOOK)
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE % html.escape(text))
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--virtual-time-budget=4000",
    ]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [str(CHROMIUM), *options, profile, "--dump-dom", probe.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    told = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert told is not None, done.stderr[-2000:]
    found = json.loads(html.unescape(told[1]))
    assert "CONSOLE" not in done.stderr, [
        line for line in done.stderr.splitlines() if "CONSOLE" in line
    ]
    assert found["width"] == 390
    assert found["scroll"] <= 390
    assert len(found["boxes"]) == 60
    for left, top, right, bottom in found["boxes"]:
        assert 0 <= left < right <= 390
        assert 0 <= top < bottom <= 844
    last = reports.views()["rows"][-1]["arms"]
    assert (
        f"student {last['student']['kl'][-1]:.3f}, baseline {last['baseline']['kl'][-1]:.3f}"
        in found["text"]
    )
    shades = [token["v"]["baseline"] for token in json.loads(Parsed(text).scripts[0])[0][:3]]
    assert [float(shade) for shade in found["shades"]] == shades
