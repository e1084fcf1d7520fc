"""The report in HTML: what it says, that it can be read by anybody, and that it needs nothing from a network."""
import base64
import json
import re
from html import unescape
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from check_links import Page, flaws

from symbreak import cli, report
from symbreak.claims import CLAIMS
from symbreak.files import home, past_damage
from symbreak.verdicts import NOT_REPRODUCED, NOT_TESTED, REPRODUCED
from symbreak.profiles import PROFILES
from symbreak.results import collect
from symbreak.figures import SAVED, Exhibit, FigureFiles, Verdicts
from symbreak.pages import asset, differences, headline
from symbreak.records import file_digest
from symbreak.runs import Store

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJg"
                       "gg==")


def toy(seeds, repaired=True):
    """Tidy data of fig01."""
    rows = [dict(alive=True, seed=s, distinct_at_init=q, noise=n,
                 test_accuracy=0.9 if q == 128 or (n and repaired) else 0.1 * q)
            for s in range(seeds) for q in (1, 2, 4, 128) for n in (0, 0.01)]
    table = pd.DataFrame(rows)
    table.attrs.update(experiment="fig01", missing=0, provenance=provenance(range(seeds)))
    return table


def provenance(seeds=(0, 1, 2)):
    return dict(profile="quick", data=["digits <8x8>"], device=["some device"], torch=["2"], commit=["c0ffee"],
                seeds=list(seeds))


@pytest.fixture
def results(tmp_path):
    """A figures folder with one picture and one executed notebook, and an empty store."""
    folder = tmp_path / "figures" / "quick"
    folder.mkdir(parents=True)
    (folder / "fig01.png").write_bytes(PNG)
    (folder / "fig01.csv").write_text("seed\n0\n")
    (folder / "fig01.json").write_text(json.dumps(dict(experiment="fig01", provenance=provenance(), missing=0)))
    output = nbformat.v4.new_output("display_data", {"image/png": base64.b64encode(PNG).decode()})
    table = nbformat.v4.new_output("execute_result", {"text/html": "<table><tr><td>1</td></tr></table>"})
    cells = [nbformat.v4.new_markdown_cell("# A <claim>\n> fig01: accuracy & noise\n\nWith $x_1$ and\n\n$$\\frac12$$"),
             nbformat.v4.new_code_cell("out = '/home/somebody'\nprofile = 'quick'",
                                       metadata=dict(tags=["injected-parameters"])),
             nbformat.v4.new_code_cell("plot()", outputs=[output, table])]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "fig01.ipynb")
    store = Store(tmp_path / "runs")
    tables = {name: collect(name, "quick", "cpu", store=store) for name in ("fig01", "fig03", "fig04")}
    return tmp_path, tables | {"fig01": toy(3)}


def written(results, **tables):
    tmp_path, quick = results
    index = report.write_report(tmp_path / "report", {"quick": quick} | tables, tmp_path / "figures")
    return index, index.read_text(encoding="utf-8")


def rows_of(html):
    """Verdicts as the table shows them."""
    return re.findall(r'<td data-label="Verdict"><span class="verdict [\w-]+">([\w ]+)</span>', html)


def test_pages_stand_alone_and_links_resolve(results):
    index, html = written(results)
    assert flaws(index.parent) == []
    notebooks = {p.stem for p in (index.parent / "notebooks").glob("*.html")}
    assert notebooks == {"quick-fig01", "quick-fig03", "quick-fig04"}
    for path in index.parent.rglob("*.html"):
        text, page = path.read_text(encoding="utf-8"), Page(path.read_text(encoding="utf-8"))
        assert text.startswith("<!doctype html>") and 'lang="en"' in text and text.count("<script") == (path == index)
        assert all(source.startswith(("data:", "figures/")) for source in page.loads)
        assert not re.search(r"https?://", re.sub(r'<a [^>]*href="[^"]*"|xmlns="[^"]*"', "", text))


def test_every_figure_has_alternative_text_and_provenance(results):
    _, html = written(results)
    pictures = re.findall(r"<img [^>]*>", html)
    assert len(pictures) == 2 and html.count("<figure>") == 1  # a thumbnail, and the picture
    alt = unescape(re.search(r'alt="([^"]*)"', pictures[1])[1])
    assert alt == f"fig01 at profile quick: {headline(report.find_notebooks()['fig01'])[1]}" and len(alt) > 50
    assert "digits &lt;8x8&gt; | some device | torch 2 | seeds 0-2 | commit c0ffee" in html  # escaped
    assert 'href="notebooks/quick-fig01.html">Notebook with its results' in html


def test_every_figure_links_its_data_its_picture_and_its_notebook(results):
    index, html = written(results)
    kinds = [address for address in re.findall(r'<a href="(figures/[^"]*)" download>', html) if "fig01" in address]
    assert kinds == [f"figures/quick/fig01.{kind}" for kind in ("csv", "png", "ipynb")]
    for kind in ("csv", "png"):
        copied = index.parent / "figures" / "quick" / f"fig01.{kind}"
        assert copied.read_bytes() == (results[0] / "figures" / "quick" / f"fig01.{kind}").read_bytes()
    notebook = nbformat.read(index.parent / "figures" / "quick" / "fig01.ipynb", 4)
    assert notebook.cells[2].outputs and "/home/somebody" not in nbformat.writes(notebook)
    page = (index.parent / "notebooks" / "quick-fig01.html").read_text(encoding="utf-8")
    assert 'href="../figures/quick/fig01.csv"' in page and 'href="../index.html#fig01"' in page


def test_who_judges_without_the_images_is_told_so(results, capsys):
    assert "ot at hand" not in written(results)[1]
    unseen = toy(3)
    unseen.attrs["unchecked"] = ["my <images>"]
    said = "ot at hand, so not compared with what the runs have seen: "
    assert f"Profile cifar: n{said}my &lt;images&gt;." in written(results, cifar={"fig01": unseen})[1]
    for table, told in ((toy(3), False), (unseen, True)):
        cli.print_claims({"fig01": table}, "quick", False)
        assert (f"N{said}my <images>." in " ".join(capsys.readouterr().out.split())) == told


def test_a_report_on_other_images_says_how_to_make_its_figures(results):
    tmp_path, quick = results
    index = report.write_report(tmp_path / "report", {"quick": quick}, tmp_path / "figures", data="folder:my images")
    commands = re.findall("<code>(symbreak reproduce fig.*?)</code>", index.read_text(encoding="utf-8"))
    wanted = "symbreak reproduce fig04 --profile quick --data 'folder:my images'"
    assert wanted in map(unescape, commands) and not [c for c in commands[:-1] if "--data" not in c]


def test_verdicts_are_those_of_the_claims(results):
    tables = dict(quick=results[1], cifar={"fig01": toy(3, repaired=False)}, paper={"fig01": toy(0)})
    _, html = written(results, **{name: table for name, table in tables.items() if name != "quick"})
    rows = report.verdicts(tables)
    wanted = list(rows.verdict)
    assert rows_of(html) == wanted and set(wanted) == {REPRODUCED, NOT_REPRODUCED, NOT_TESTED}
    for verdict in set(wanted): assert f">{wanted.count(verdict)} {verdict}</span>" in html
    failed = html.split('id="not-reproduced"')[1].split("</section>")[0]
    assert failed.count("<li>") == rows[rows.verdict == NOT_REPRODUCED].statement.nunique()
    assert "Profile cifar" in failed


def test_the_summary_states_each_headline_claim_once_with_all_its_profiles(results):
    _, html = written(results, cifar={"fig01": toy(3, repaired=False)})
    table = html.split('id="headlines"')[1].split("</section>")[0]
    stated = [unescape(text) for text in re.findall(r'<td class="statement">(.*?) \(<a', table)]
    wanted = [c.headline for c in CLAIMS
              if c.headline and c.figure in results[1] and any(map(c.is_meant_for, ("quick", "cifar")))]
    assert stated == list(dict.fromkeys(wanted))
    assert re.findall(r'<th scope="col">(.*?)</th>', table) == ["Claim", "quick", "cifar"]


def test_the_claims_can_be_filtered_by_what_the_rows_say_of_themselves(results):
    _, html = written(results, cifar={"fig01": toy(3)})
    form = html.split('<form class="filter"')[1].split("</form>")[0]
    assert form.split(">")[0].endswith("hidden")  # until a script shows it
    rows = re.findall(r'<tr data-figure="(\w+)" data-verdict="([\w ]+)" data-profile="(\w+)"', html)
    assert len(rows) == len(rows_of(html))
    for values in zip(*rows):
        for value in set(values): assert f"<option>{value}</option>" in form
    script = html.split("<script>")[1]
    for name in re.findall(r'name="(\w+)"', form): assert name in script
    for figure in {row[0] for row in rows}: assert html.count(f'id="claims-{figure}"') == 1


def test_the_device_is_said_once_per_profile_and_not_in_every_row(results):
    _, html = written(results, cifar={"fig01": toy(3)})
    table = html.split('id="all-claims"')[1]
    assert "Device at profile quick: some device." in table and "Device at profile cifar: some device." in table
    assert "some device" not in table.split("<tbody>")[1]


def test_the_style_sheets_and_templates_are_installed_with_the_package():
    packaged = (Path(report.__file__).parents[1] / "setup.py").read_text()
    assert 'package_data={"symbreak": ["assets/*"]}' in packaged
    assert {p.name for p in (files("symbreak") / "assets").iterdir()} >= {"page.css", "report.html.j2", "filter.js"}


def test_missing_figures_are_named_with_the_command_that_makes_them(results):
    _, html = written(results)
    for name in ("fig03", "fig04"):
        assert f"<code>symbreak reproduce {name} --profile quick</code> makes it" in html
    for profile in PROFILES.keys() - {"quick"}:
        assert f"<code>symbreak reproduce --profile {profile}</code> makes it" in html


def test_an_old_picture_is_called_old(results):
    tmp_path, quick = results
    assert "Drawn from other results" not in written(results)[1]
    quick["fig01"] = toy(4)
    assert "Drawn from other results" in written(results)[1]


@pytest.mark.parametrize("kind, content", [
    ("json", ""), ("json", "null"), ("json", "{}"), ("json", "[1]"), ("json", '{"provenance": null}'), ("png", ""),
    ("csv", ""), ("ipynb", ""), ("ipynb", "null"), ("ipynb", '{"cells": 1}')])
def test_a_damaged_file_of_a_figure_is_named_and_left_out(results, kind, content):
    path = results[0] / "figures" / "quick" / f"fig01.{kind}"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: damaged, .*; restore it, or delete it and let"):
        written(results)
    with past_damage() as damaged: index, html = written(results)
    assert len(damaged) == 1 and flaws(index.parent) == []
    shown = {path.suffix for path in (index.parent / "figures" / "quick").glob("fig01.*")}
    assert shown == {"json": {".ipynb"}, "png": {".ipynb"}, "csv": {".ipynb", ".png"},
                     "ipynb": {".ipynb", ".csv", ".png"}}[kind]
    assert ("Notebook with its results" in html) == (kind != "ipynb")


@pytest.mark.parametrize("kind", SAVED)
def test_a_changed_file_of_a_figure_is_named_and_left_out(results, kind):
    files = FigureFiles("fig01", results[0] / "figures" / "quick")
    files.path("svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    noted = dict(files={kind: file_digest(files.path(kind)) for kind in SAVED})
    files.path("json").write_text(json.dumps(files.source() | noted))
    assert list(report.files_there("fig01", "quick", results[0] / "figures")) == list(report.KINDS)
    files.path(kind).write_bytes(files.path(kind).read_bytes()[:-1])
    assert not files.is_whole()
    with pytest.raises(ValueError, match=f"^{re.escape(str(files.path(kind)))}: not as it was saved, by the digest in"):
        written(results)
    with past_damage() as damaged: index, html = written(results)
    assert len(damaged) == 1 and flaws(index.parent) == []
    assert f"fig01.{kind}" not in {path.name for path in (index.parent / "figures" / "quick").iterdir()}


def test_a_damaged_committed_notebook_is_named_and_left_out(tmp_path):
    for name in ("fig01_a", "fig02_b"): nbformat.write(nbformat.v4.new_notebook(), tmp_path / f"{name}.ipynb")
    (damaged := tmp_path / "fig01_a.ipynb").write_text("")
    with pytest.raises(ValueError, match=f"{re.escape(str(damaged))}: damaged"): report.find_notebooks(tmp_path)
    with past_damage(): assert list(report.find_notebooks(tmp_path)) == ["fig02"]


def test_where_we_differ_is_copied_from_the_notebooks(results):
    _, html = written(results)
    for name in ("fig01", "fig03", "fig04"):
        listed = re.findall(r"^\d+\. ", differences(report.find_notebooks()[name]), re.MULTILINE)
        assert listed and html.split(f'<h3 id="{name}">')[1].split("</section>")[0].count("<li>") == len(listed)


def test_notebook_pages_show_formulas_and_no_paths(results):
    index, _ = written(results)
    html = (index.parent / "notebooks" / "quick-fig01.html").read_text(encoding="utf-8")
    assert html.count("<math") == 2 and "<msub>" in html and 'display="block"' in html
    assert "/home/somebody" not in html and "<title>A &lt;claim&gt;</title>" in html
    assert 'alt="A &lt;claim&gt;: accuracy &amp; noise"' in html


def test_writing_twice_gives_the_same_bytes_and_leaves_nothing_else(results):
    index, _ = written(results)
    before = {p: p.read_bytes() for p in index.parent.rglob("*") if p.is_file()}
    written(results)
    assert {p: p.read_bytes() for p in index.parent.rglob("*") if p.is_file()} == before
    assert {p.suffix for p in before} == {".html", ".png", ".csv", ".ipynb"}


def test_a_failure_leaves_the_old_report(results, monkeypatch):
    index, html = written(results)
    monkeypatch.setattr(report, "report_page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError): written(results)
    assert index.read_text(encoding="utf-8") == html


def test_the_command(results, capsys, monkeypatch):
    tmp_path, _ = results
    monkeypatch.setenv("SYMBREAK_RUNS", str(tmp_path / "runs"))
    arguments = ["--profile", "quick", "--out", str(tmp_path / "out"), "--figures", str(tmp_path / "figures")]
    assert cli.main(["report", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "not tested" in printed and f"Report: {tmp_path / 'out' / 'index.html'}" in printed
    assert flaws(tmp_path / "out") == []
    assert not list((tmp_path / "runs").glob("*/record.json"))  # nothing was trained


def test_bad_profile_and_folder(capsys, tmp_path):
    assert cli.main(["report", "--profile", "huge"]) == 2
    assert "profile: 'huge'; allowed: quick, ladder, cifar, full, paper, sprint, all" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["report", "--profile", "quick", "--out", str(tmp_path / "file" / "report")]) == 2
    assert "cannot write to" in capsys.readouterr().err


def test_without_a_clone_the_error_comes_first_and_says_what_is_missing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("symbreak.files.own_checkout", lambda: None)  # as an installed package
    monkeypatch.delenv("SYMBREAK_RUNS", raising=False)
    assert home() == tmp_path
    assert cli.main(["report", "--profile", "quick"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no figure notebooks in" in printed.err and "clone of the repository" in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("page, flaw", [
    ("<img src='data:,'>", "no <html lang"),
    ("<html lang='en'><img src='data:,'>", "without alternative text"),
    ("<html lang='en'><a href='nowhere.html'>x</a>", "no such file"),
    ("<html lang='en'><a href='#nowhere'>x</a>", "no such place"),
    ("<html lang='en'><script src='https://a.example/b.js'></script>", "loaded from a network"),
    ("<html lang='en'><link rel='stylesheet' href='//a.example/b.css'>", "loaded from a network"),
    ("<html lang='en'><style>p {background: url(https://a.example/b.png)}</style>", "loaded from a network"),
])
def test_the_checker_finds_flaws(tmp_path, page, flaw):
    (tmp_path / "page.html").write_text(page)
    assert any(flaw in found for found in flaws(tmp_path))


def test_the_checker_accepts_links_out_and_within(tmp_path):
    links = "<a href='https://a.example'>x</a><a href='#a'>y</a><a href='page.html#a'>z</a>"
    (tmp_path / "page.html").write_text(f"<html lang='en'><p id='a'>{links}")
    assert flaws(tmp_path) == []


# what a label may hold

HOSTILE = """<script>alert("1")</script>'&amp;--><img src=x onerror=alert(1)>"""


def harmless(html):
    """Neither elements nor attributes come from the label, which is there to be read, if anywhere."""
    soup = BeautifulSoup(html, "html.parser")
    scripts = [script.string for script in soup.find_all("script")]
    return scripts in ([], [asset("filter.js")]) and not soup.select("[onerror], [src=x]")


def test_labels_are_escaped_on_every_page(results):
    tmp_path, quick = results
    facts = provenance() | dict(data=[HOSTILE], device=[HOSTILE], torch=[HOSTILE], commit=[HOSTILE], images=[HOSTILE])
    for table in quick.values(): table.attrs.update(provenance=facts, incomplete=[HOSTILE], unchecked=[HOSTILE])
    folder = tmp_path / "figures" / "quick"
    (folder / "fig01.json").write_text(json.dumps(dict(experiment="fig01", provenance=facts, missing=0)))
    notebook = nbformat.read(folder / "fig01.ipynb", 4)
    shown = {"text/html": pd.DataFrame({HOSTILE: [HOSTILE]}).to_html(), "text/plain": HOSTILE}
    notebook.cells[1].source += f"\ndata = {HOSTILE!r}"
    notebook.cells += [nbformat.v4.new_code_cell(f"print({HOSTILE!r})", outputs=[
        nbformat.v4.new_output("stream", name="stdout", text=HOSTILE),
        nbformat.v4.new_output("execute_result", shown),
        nbformat.v4.new_output("execute_result", {"text/plain": HOSTILE})])]
    nbformat.write(notebook, folder / "fig01.ipynb")
    index, html = written((tmp_path, quick))
    pages = list(index.parent.rglob("*.html"))
    assert len(pages) == 4 and all(harmless(page.read_text(encoding="utf-8")) for page in pages)
    assert HOSTILE in BeautifulSoup(html, "html.parser").get_text()
    page = (index.parent / "notebooks" / "quick-fig01.html").read_text(encoding="utf-8")
    assert HOSTILE in BeautifulSoup(page, "html.parser").get_text()


def test_labels_are_escaped_in_what_a_notebook_shows_and_writes(tmp_path):
    row = dict(figure="fig01", statement=HOSTILE, band=HOSTILE, measured=HOSTILE, margin="", verdict=REPRODUCED)
    html = Verdicts(pd.DataFrame([row]))._repr_html_()
    assert harmless(html) and html.count("&lt;script&gt;") == 3
    table = pd.DataFrame({HOSTILE: [HOSTILE]})
    table.attrs["provenance"] = provenance() | dict(data=[HOSTILE])
    exhibit = object.__new__(Exhibit)
    exhibit.files, exhibit.table = FigureFiles("fig01", tmp_path), table
    exhibit.save_table(table)
    exhibit.save(plt.figure())
    assert harmless((tmp_path / "fig01.html").read_text())
    for element in ElementTree.parse(tmp_path / "fig01.svg").iter(): assert not str(element.tag).endswith("script")
