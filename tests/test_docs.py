"""The documentation site, as far as it can be checked without building it, which `make docs` does, with every link."""
import ast
import importlib.util
import re
import sys
from html import unescape
from pathlib import Path

import nbformat
import pytest
import yaml

from symbreak import pages
from symbreak.claims import CLAIMS
from symbreak.files import home
from symbreak.pages import mathml

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
WRITTEN = sorted(DOCS.rglob("*.md"))


def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


HOOKS = hooks()
MADE = [*(n.page for n in HOOKS.notebooks() + HOOKS.figure_notebooks()),
        *(f"reference/{n.name}.md" for n in HOOKS.notebooks()), *HOOKS.downloads()]


def leaves(nav):
    if isinstance(nav, str): return [nav]
    return [leaf for item in (nav.values() if isinstance(nav, dict) else nav) for leaf in leaves(item)]


def test_configuration_needs_no_network_and_names_files_that_exist():
    assert CONFIG["theme"]["font"] is False and CONFIG["use_directory_urls"] is False and "offline" in CONFIG["plugins"]
    assert CONFIG["site_dir"] == "build/site"
    for name in [*CONFIG["extra_css"], *CONFIG["extra"]["polyfills"]]: assert (DOCS / name).is_file()
    for name in CONFIG["hooks"]: assert (ROOT / name).is_file()
    assert not re.search(r"https?://", (ROOT / "mkdocs.yml").read_text())


def test_every_page_of_the_navigation_exists_and_every_page_is_in_it():
    nav = leaves(HOOKS.expand(CONFIG["nav"]))
    assert "..." not in nav and len(set(nav)) == len(nav)
    pages = {p.relative_to(DOCS).as_posix() for p in WRITTEN} | {p for p in MADE if p.endswith(".md")}
    assert set(nav) == pages


def test_the_gallery_shows_every_committed_picture():
    shown = re.findall(r"\]\((figures/\w+/\w+\.png)\)\]\((figures/[\w-]+\.md)\)", HOOKS.gallery())
    assert {picture for picture, _ in shown} == {address for address in HOOKS.downloads() if address.endswith(".png")}
    assert {page for _, page in shown} <= set(MADE)


def test_navigation_of_the_notebooks_is_divided_as_their_reading_list_is():
    nav = {title: pages for item in HOOKS.expand(CONFIG["nav"]) for title, pages in item.items()}
    divided = [title for item in nav["Reference"][1:] for title in item]
    assert divided == re.findall("^## (.*)$", (DOCS.parent / "nbs" / "README.md").read_text(), re.MULTILINE)[:4]
    assert leaves(nav["The argument"])[1:] == [n.page for n in HOOKS.notebooks()]
    assert [title for item in nav["The argument"][1:] for title, pages in item.items() if isinstance(pages, list)] \
        == divided[1:]


def test_navigation_says_what_a_figure_shows():
    labels = [n.label for n in HOOKS.figure_notebooks()]
    assert len(set(labels)) == len(labels) and not any(re.search(r"(fig|tab|abl)\d", label) for label in labels)
    assert HOOKS.label("fig99", Path("fig99_break_time.ipynb")) == "Break time"


def test_every_figure_page_links_its_data_its_picture_and_its_notebook():
    for notebook in HOOKS.figure_notebooks():
        text = HOOKS.notebook_markdown(notebook)
        linked = {f"figures/{address}" for address in re.findall(r"\]\(([\w/]+\.(?:csv|png|svg|ipynb))\)", text)}
        assert linked <= set(HOOKS.downloads())
        assert {"csv", "png", "ipynb"} <= {Path(address).suffix[1:] for address in linked}, notebook.page
        assert linked >= {a for a in HOOKS.downloads() if re.match(rf"figures/\w+/{notebook.name}\.", a)}


def test_what_few_readers_open_is_folded_and_nothing_else():
    def cell(source, *tags): return nbformat.v4.new_code_cell(source, metadata=dict(tags=list(tags)))
    assert HOOKS.fold(cell("import os\nfrom pathlib import Path")) == "Imports"
    assert HOOKS.fold(cell("from os import path\n\n_all_ = ['path']")) == "Imports"
    assert HOOKS.fold(cell("def _one(): pass\nclass _Two: pass")) == "Helpers: <code>_one</code>, <code>_Two</code>"
    assert HOOKS.fold(cell("ONE = (1, 2)\ndef _one(): pass")) == "Helpers: <code>ONE</code>, <code>_one</code>"
    assert HOOKS.fold(cell("x = 1", "parameters")) == "Parameters"
    for shown in ("import os\nos.getcwd()", "def one(): pass\ndef _two(): pass", "", "!ls", "ONE = 1",
                  "CLAIMS = [Claim(1)]\ndef _one(): pass"):
        assert HOOKS.fold(cell(shown)) == ""
    text = HOOKS.notebook_markdown(HOOKS.notebooks()[0])
    assert text.count("<summary>Imports</summary>") == 1 and text.count("<details") == text.count("</details>")


def test_the_first_page_shows_a_titled_figure_and_every_headline_claim_once():
    text = (DOCS / "index.md").read_text()
    assert text.index("**Identical features train") < text.index("(figures/full/fig04.png)") < text.index("```")
    filled = HOOKS.on_page_markdown(text, None, None, None)
    assert "<!--" not in filled and HOOKS.repository().startswith("https://") and HOOKS.repository() in filled
    assert "(CITATION.cff)" in filled
    stated = [unescape(found) for found in re.findall(r'<td class="statement">(.*?) \(<a', filled)]
    assert stated and len(set(stated)) == len(stated)
    assert set(stated) <= {claim.headline for claim in CLAIMS if claim.headline}
    for address in re.findall(r'<a href="(figures/[^"]*)\.html">', filled): assert f"{address}.md" in MADE


def test_notebooks_come_in_reading_order():
    labels = [n.label for n in HOOKS.notebooks()]
    assert labels.index("init") < labels.index("nets") < labels.index("propagation") < labels.index("cli")
    for label in labels: assert f"**[{label}](" in HOOKS.reading_list()


@pytest.mark.parametrize("page", WRITTEN, ids=lambda p: p.stem)
def test_links_of_written_pages_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not link.startswith("http"):
            path = (page.parent / link).resolve()
            assert path.is_file() or path.relative_to(DOCS).as_posix() in MADE, link


@pytest.mark.parametrize("page", sorted((DOCS / "howto").glob("*.md")), ids=lambda p: p.stem)
def test_what_the_readme_links_can_be_read_as_a_file(page):
    text = page.read_text()
    assert "][" not in text
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert link.startswith("http") or (page.parent / link).resolve().is_file(), link
    site = HOOKS.on_page_markdown(text, None, None, None)
    for link in re.findall(r"\]\((\.\./argument/[^)#]+)", site): assert link.removeprefix("../") in MADE, link


@pytest.mark.parametrize("page", WRITTEN, ids=lambda p: p.stem)
def test_python_in_written_pages_compiles_and_imports(page):
    for block in re.findall(r"^( *)```python\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL):
        tree = ast.parse("\n".join(line[len(block[0]):] for line in block[1].splitlines()))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for name in node.names: assert hasattr(module, name.name), f"{node.module}.{name.name}"


def test_options_of_the_command_that_pages_mention_exist(capsys):
    from symbreak import cli
    known = ""
    for verb in cli.VERBS:
        with pytest.raises(SystemExit): cli.main([verb, "--help"])
        known += capsys.readouterr().out
    known += (ROOT / "scripts" / "gpu_campaign.py").read_text()
    for page in WRITTEN:
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", page.read_text()):
            assert option in known or option in ("--help", "--nproc-per-node"), f"{page.name}: {option}"


def test_every_formula_of_the_notebooks_is_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(pages, "mathml", lambda tex, display=False: drawn.append((tex, mathml(tex, display))) or "")
    for path in [*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs" / "figures").glob("*.ipynb")]:
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "markdown": pages.markdown(cell.source)
    assert len(drawn) > 100
    assert [tex for tex, html in drawn if not html.startswith("<math")] == []


def test_notebook_pages_keep_results_and_hide_machinery():
    notebook = next(n for n in HOOKS.notebooks() if n.label == "nets")
    text = HOOKS.notebook_markdown(notebook)
    assert "17,115,354" in text.replace("17115354", "17,115,354") and "class ConstNet" in text
    assert "nbdev_export" not in text and "default_exp" not in text and "#| export" not in text


def test_formulas_become_mathml():
    inline, display = '<span class="arithmatex">\\(x &lt; y\\)</span>', '<div class="arithmatex">\\[\\mu\\]</div>'
    html = HOOKS.with_mathml(f"<p>{inline}</p>{display}")
    assert html.count("<math") == 2 and html.count('display="block"') == 1 and "arithmatex" not in html


def test_the_page_about_sweeps_trains(tmp_path, monkeypatch, capsys):
    """Its Python as it stands, but for an engine that needs no processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SYMBREAK_RUNS", str(tmp_path / "runs"))
    block = re.search(r"```python\n(.*?)```", (DOCS / "howto" / "slurm.md").read_text(), re.DOTALL)[1]
    found = dict(__name__="__main__")
    exec(compile(block.replace('Engine("auto"', 'Engine("debug"'), "slurm.md", "exec"), found)
    assert len(found["table"]) == 4 * 3 and len(list((tmp_path / "runs").glob("*/record.json"))) == 4
    assert "asymmetry" in capsys.readouterr().out


def test_no_notebook_tells_where_its_checkout_was():
    told = [path.name for path in (home() / "nbs").rglob("*.ipynb") if str(home()) in path.read_text(encoding="utf-8")]
    assert not told
