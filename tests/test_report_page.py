"The report of the committed results: what it says, and how it looks in a real browser."
import json
import re
import shutil
from html import unescape
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from browser import context, page  # noqa: F401 (fixtures)
from conftest import ROOT

from sage_nb.core import DataError
from sage_nb.report import write_report

FOLDERS = ("tables", "figures", "replication")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    "A copy of the project's results with their report."
    folder = tmp_path_factory.mktemp("report") / "results"
    for name in FOLDERS:
        shutil.copytree(ROOT / "results" / name, folder / name)
    write_report(folder, folder)
    return folder


@pytest.fixture(scope="module")
def html(made) -> str:
    return (made / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def results(made, tmp_path) -> Path:
    "Results that a test may change."
    return Path(shutil.copytree(made, tmp_path / "results"))


def prose(html: str) -> str:
    "What the page tells, without formulas, drawings, tables, names of others' works and the appendix; links to numbers are left."
    body = re.search(r"(?s)<body>(.*)</body>", html)[1].split('<section id="provenance">')[0]
    return re.sub(r"(?s)<(nav|math|svg|table|cite|code|details|h4)\b.*?</\1>|<p class=\"files\">.*?</p>", "", body).replace("Aff-Wild2", "")


def words(html: str) -> str:
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", "", html))).replace("−", "-")


def change(results: Path, name: str, row: str, **cells) -> None:
    "Cells of a table, in its csv."
    path = results / f"{name}.csv"
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    rows = table[table.iloc[:, 0] == row].index
    assert len(rows)
    for column, value in cells.items():
        table.loc[rows, column] = value
    table.to_csv(path, index=False)


# --- what it says

def test_every_number_in_the_prose_is_a_link_to_where_it_comes_from(made, html):
    text = prose(html)
    numbers = re.findall(r'<a class="n" href="#([\w-]+)" title="([^"]+)">(.*?)</a>', text)
    assert len(numbers) > 150
    assert re.findall(r"[^.]*\d[^.]*", words(re.sub(r'<a class="n".*?</a>', "", text))) == []
    entries = json.loads((made / "report.provenance.json").read_text())["cells"]
    shown = dict(re.findall(r'<tr id="([\w-]+)"><th scope=row class=l>(.*?)</th>', html))
    assert {name for name, *_ in numbers} <= set(entries) == set(shown)
    for name, _, printed in numbers:
        [(column, entry)] = entries[name].items()
        assert printed == shown[name]
        if entry["value"] and re.fullmatch(r"[−+]?\d+\.\d+", printed):
            decimals = len(printed.partition(".")[2])
            assert abs(float(printed.replace("−", "-")) - float(entry["value"])) <= 0.5 * 10**-decimals + 1e-9, (name, column)


def test_the_chain_leads_back_to_the_corpus(made, html):
    about = json.loads((made / "report.provenance.json").read_text())
    reached, new = set(), {"tables", "figures"}
    while new:
        reached |= new
        new = {value["made_by"] for stage in new for value in about["stages"][stage]["inputs"].values() if value.get("made_by")} - reached
    assert {"evaluate", "train", "encode", "prepare"} <= reached
    assert {path for stage in reached for path in about["stages"][stage]["inputs"]} >= {"data/corpus"} and all(f'id="stage-{stage}"' in html for stage in reached)
    assert set(about["runs"]) >= {"sage-0", "concat-0"} and about["runs"]["sage-0"]["fingerprint"]


def test_a_changed_cell_changes_the_prose(results):
    change(results, "tables/comparison", "sage", p="0.123456")
    changed = words(prose(write_report(results, results).read_text()))
    assert "SAGE reaches a mean concordance of 0.123 [" in changed


@pytest.mark.parametrize("cells, wanted", [
    (dict(verdict="SAGE above", sage_gain_low="0.01", sage_gain_high="0.02"), "It is above every one of the 17 trained baselines"),
    (dict(verdict="SAGE below", sage_gain_low="-0.02", sage_gain_high="-0.01"), "trained baselines it is above none and below 17 (visual alone"),
    (dict(verdict="not told apart", sage_gain_low="-0.02", sage_gain_high="0.01"), "trained baselines it is above none and not told apart from 17 (visual alone")])
def test_who_wins_is_computed(results, cells, wanted):
    table = pd.read_csv(results / "tables/comparison.csv", dtype=str, keep_default_na=False)
    for model in table.model[table.verdict != ""]:
        change(results, "tables/comparison", model, **cells)
    told = words(write_report(results, results).read_text())
    assert wanted in told
    assert {"SAGE above": "SAGE has more", "SAGE below": "SAGE has less", "not told apart": "SAGE is not told apart from it"}[cells["verdict"]] in told


def test_bad_news_is_told(results):
    change(results, "tables/calibration", "estimate", coverage_after_low="0.70", coverage_after_high="0.80", rank_correlation_low="-0.3", rank_correlation_high="-0.2")
    change(results, "tables/detection", "visual nuisance", gain_low="-0.2", gain_high="-0.1", auroc_low="0.4")
    change(results, "tables/claims", "baselines significantly above SAGE", measured="2.0", met="False")
    change(results, "tables/conditions", "visual alone (P)", met="False")
    change(results, "tables/ablation", "no_ordinal", gain_low="0.01", gain_high="0.02", seeds="1")
    told = words(prose(write_report(results, results).read_text()))
    for sentence in ("clearly fewer than the nine in ten", "surer where it errs more", "less than flags and energy", "baselines significantly above SAGE: wanted 0, measured 2",
                     "misses 1: visual alone (P)", "which speaks against the choice that was made: no ordinal term", "of the variants were trained with one seed", "not clearly better than chance at "):
        assert sentence in told, sentence


def test_without_an_interval_nothing_is_told(results):
    none = dict.fromkeys(("coverage_after_low", "coverage_after_high", "rank_correlation_low", "rank_correlation_high"), "")
    change(results, "tables/calibration", "estimate", **none)
    change(results, "tables/ablation", "no_ordinal", gain_low="", gain_high="")
    change(results, "tables/detection", "visual nuisance", gain_low="", gain_high="")
    change(results, "tables/robustness_missing", "sage", low="", high="")
    change(results, "tables/robustness_losses", "occlusion", low="", high="")
    told = words(prose(write_report(results, results).read_text()))
    for sentence in ("hold the truth, with no interval to tell it from the nine in ten", "[–, –], without an interval, so that nothing is said of which frames are hard",
                     "Without an interval, so that nothing is said of it: no ordinal term", "with no interval to tell it from flags and energy",
                     "with no interval to tell it from the model of sound alone"):
        assert sentence in told, sentence
    assert re.search(r"there is no interval in \d \(occlusion \(", told)
    assert "clearly fewer" not in told and "Which frames are hard." not in told


def test_a_tie_is_called_one(results):
    scores = pd.read_csv(results / "tables/robustness.csv", dtype=str).set_index("model")
    change(results, "tables/robustness", "rjca", seen=scores.at["sage", "seen"])
    change(results, "tables/robustness", "jca", unseen="0.9")
    change(results, "tables/robustness", "tagf", unseen=scores.at["sage", "unseen"])
    told = words(prose(write_report(results, results).read_text()))
    assert re.search(r"that training contains SAGE keeps a mean of [\d.]+, as much as RJCA;", told)
    assert re.search(r"that it does not contain SAGE keeps a mean of [\d.]+, less than JCA and as much as TAGF. These are means set side by side, without a test or an interval.", told)


def test_criteria_that_are_counted_wrongly_are_refused(results):
    path = results / "replication/verdicts.csv"
    table = path.read_text()
    row = "second,baselines significantly above SAGE,0.000000,,,0,"
    assert row + "True" in table
    path.write_text(table.replace(row + "True", row + "False"))
    with pytest.raises(DataError, match="verdicts.csv: of its criteria for “second” 4 of 5 are met, which is not what its row"):
        write_report(results, results)


def test_the_verdict_counts_and_not_the_interval_before_correction(results):
    table = pd.read_csv(results / "tables/comparison.csv", dtype=str, keep_default_na=False)
    for model in table.model[table.verdict != ""]:
        change(results, "tables/comparison", model, verdict="not told apart", sage_gain_low="0.01", sage_gain_high="0.02")
    told = words(write_report(results, results).read_text())
    assert "SAGE is not told apart from it (difference before correction" in told and "SAGE has more" not in told


def test_of_another_corpus_it_is_not_called_the_samples(results):
    for path in results.rglob("*"):
        if path.suffix in (".md", ".json"):
            path.write_text(path.read_text().replace("the sample corpus 1.0", "the corpus mine"))
    told = words(write_report(results, results).read_text().split('id="provenance"')[0])
    assert "a report on corpus mine" in told and "It is not of the sample corpus that comes with the project" in told and "This report is of the sample" not in told


@pytest.mark.parametrize("name", ["tables/comparison.csv", "tables/claims.provenance.json", "tables/published.md", "figures/clip.svg", "figures/robustness_areas.provenance.json",
                                  "tables/robustness_losses.md", "replication/verdicts.csv"])
def test_a_missing_file_is_named(results, name):
    (results / "report.html").unlink()
    (results / name).unlink()
    with pytest.raises(DataError, match=f"{re.escape(name)}: no such file, but the report shows it"):
        write_report(results, results)
    assert not (results / "report.html").exists()


def test_results_that_are_not_of_one_piece_are_refused(results):
    path = results / "figures/clip.provenance.json"
    about = json.loads(path.read_text())
    about["stages"]["evaluate"]["inputs"]["work/runs"]["hash"] = "0" * 16
    path.write_text(json.dumps(about))
    with pytest.raises(DataError, match="figures/clip.svg: its stage evaluate is another than that of the other tables and figures"):
        write_report(results, results)
    table = results / "tables/ablation.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(DataError, match="ablation.csv: its rows are not those of its markdown and provenance"):
        write_report(results, results)


def test_same_results_same_bytes_and_one_small_file(made, html, tmp_path):
    write_report(made, tmp_path)
    assert all((tmp_path / name).read_bytes() == (made / name).read_bytes() for name in ("report.html", "report.provenance.json"))
    assert len(html) < 10e6 and "<script" not in html


def test_links_lead_somewhere(made, html):
    anchors = re.findall(r'\bid="([^"]+)"', html)
    assert len(anchors) == len(set(anchors)) and set(re.findall(r'href="#([^"]+)"', html)) <= set(anchors)
    for link in set(re.findall(r"href=[\"']([^\"'#][^\"']*)", html)) - {"data:,"}:
        if not link.startswith("https://arxiv.org/"):
            there = made / link if not link.startswith("../") else ROOT / link.removeprefix("../")
            assert there.is_file(), link
    for path in (ROOT / "results/figures").glob("*.provenance.json"):
        name = path.name.removesuffix(".provenance.json")
        assert name == "architecture" or f'id="figure-{name}"' in html  # which the report draws itself
    for path in [*(ROOT / "results/tables").glob("*.csv"), *(ROOT / "results/replication").glob("*.csv")]:
        assert f'id="table-{path.stem}"' in html


# --- how it looks

def test_nothing_fails_and_nothing_is_fetched(page, made):
    page.goto((made / "report.html").as_uri())
    assert page.errors == [] and [url for url in page.requests if not url.startswith("data:")] == [(made / "report.html").as_uri()]
    pictures = page.evaluate("Promise.all([...document.images].map(async i => (await i.decode(), [i.alt.length, i.naturalWidth, i.naturalHeight, i.getBoundingClientRect().width, i.checkVisibility()])))")
    assert len(pictures) == len(list((ROOT / "results/figures").glob("*.svg"))) - 1
    assert all(alt > 20 and min(width, height, shown) > 100 and visible for alt, width, height, shown, visible in pictures)
    assert page.evaluate("[...document.querySelectorAll('math')].every(m => m.getBoundingClientRect().width > 8 && m.namespaceURI.endsWith('MathML'))")
    assert page.evaluate("document.querySelector('svg.drawing').getBoundingClientRect().width") > 600


def test_nothing_sticks_out(page, made):
    page.goto((made / "report.html").as_uri())
    for opened in (False, True):
        page.evaluate(f"document.querySelectorAll('details').forEach(d => d.open = {json.dumps(opened)})")
        for width in (320, 390, 768, 1280, 1920):
            page.set_viewport_size(dict(width=width, height=844))
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("""[...document.querySelectorAll('p, h1, h2, h3, h4, li, figcaption, .tile, pre')].filter(e => e.checkVisibility() && !e.closest('.scroll, nav') &&
                                    (e.getBoundingClientRect().right > innerWidth || e.getBoundingClientRect().left < 0)).map(e => e.textContent.slice(0, 60))""") == [], width


def test_light_and_dark_are_both_drawn(page, made, tmp_path):
    page.set_viewport_size(dict(width=1280, height=900))
    means = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.goto((made / "report.html").as_uri())
        for section in ("claim", "method", "results", "robustness", "provenance"):
            page.evaluate(f"document.getElementById('{section}').scrollIntoView()")
            picture = cv2.imdecode(np.frombuffer(page.screenshot(), "uint8"), cv2.IMREAD_GRAYSCALE)
            assert picture.std() > 15, (scheme, section)  # not blank
            means[scheme, section] = picture.mean()
    assert all(mean > 215 if scheme == "light" else mean < 70 for (scheme, _), mean in means.items()), means


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_told_from_its_background(page, made, scheme):
    "Contrast of at least 4.5, as the accessibility guidelines want it."
    page.emulate_media(color_scheme=scheme)
    page.goto((made / "report.html").as_uri())
    poor = page.evaluate("""() => {
        const rgb = c => c.match(/[\\d.]+/g).map(Number), light = c => { const [r, g, b] = rgb(c).slice(0, 3).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b };
        const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > .5) return getComputedStyle(e).backgroundColor } return 'rgb(255,255,255)' };
        return [...new Set([...document.querySelectorAll('p, a, li, td, th, summary, h1, h2, b, i, span, code')].filter(e => e.checkVisibility() && e.textContent.trim()).map(e => {
            const a = light(getComputedStyle(e).color), b = light(behind(e)), contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
            return contrast < 4.5 ? `${e.tagName}.${e.className} ${contrast.toFixed(2)}` : '' }))].filter(Boolean) }""")
    assert poor == []


def test_a_number_leads_to_its_entry(page, made):
    page.goto((made / "report.html").as_uri())
    page.locator(".outcome a.n").first.click()
    entry = page.locator("tr:target")
    assert entry.count() == 1 and page.evaluate("(r => r.top >= 0 && r.bottom <= innerHeight)(document.querySelector('tr:target').getBoundingClientRect())")
    assert "sage, equal" in entry.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_paper_it_is_whole(page, made, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto((made / "report.html").as_uri())
    pdf = page.pdf(prefer_css_page_size=True, print_background=True)
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", pdf)) > 12
    page.emulate_media(media="print", color_scheme=scheme)
    look = "[getComputedStyle(document.documentElement).colorScheme, getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color, getComputedStyle(document.querySelector('svg .visual rect')).fill, getComputedStyle(document.querySelector('img.plot')).filter]"
    assert page.evaluate(look) == ["light", "rgb(255, 255, 255)", "rgb(0, 0, 0)", "rgb(211, 236, 227)", "none"]
    page.set_viewport_size(dict(width=680, height=960))  # A4 between its margins
    hidden = page.evaluate("[...document.querySelectorAll('figcaption details p, section table')].filter(e => !e.checkVisibility() || e.getBoundingClientRect().height < 5).length")
    assert hidden == 0 and not page.locator("nav").is_visible()
    assert page.evaluate("[...document.querySelectorAll('table')].filter(t => t.getBoundingClientRect().right > innerWidth + 1).map(t => t.closest('figure, section').id)") == []
