"""What the site takes from the notebooks: a page for each, in reading order, a gallery of figures, a reference page per
module, and on the first page the headline claims, computed from the data in figures/ and results/.

mkdocs calls the functions `on_*`. Notebooks become Markdown by nbconvert, so that the theme treats them like any other
page; formulas become MathML, which needs no script. Nothing is executed here.
"""
import ast
import re
import sys
from configparser import ConfigParser
from dataclasses import dataclass
from functools import cache
from html import unescape
from itertools import takewhile
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

from symbreak.experiments import EXPERIMENTS, offered
from symbreak.pages import asset, headline, mathml, portable, presentable
from symbreak.headlines import committed_table, lying
from symbreak.profiles import PROFILES
from symbreak.report import KINDS, devices, files_there, headline_table, verdicts

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))
from reading_order import SECTIONS  # noqa: E402

HIDDEN = re.compile(r"#\|\s*(hide|default_exp)\b")
DIRECTIVES = re.compile(r"^#\|.*\n?", re.MULTILINE)
STYLES = ("palette.css", "claims.css")  # shared with the report
SCALES = {"quick": "digits", "ladder": "digits, many sizes of noise", "cifar": "CIFAR-10, small",
          "full": "all of CIFAR-10", "paper": "the paper's scale", "sprint": "the paper's network, in short"}
SHOWS = {  # what the navigation calls a figure; one that is not here is called by the name of its file
    "fig01": "Distinct features of a toy network",
    "fig02": "Architecture",
    "fig03": "Signal propagation",
    "fig04": "Symmetry breaking: accuracy",
    "fig05": "Symmetry breaking: weight correlation",
    "fig06": "LeakyNet: averaging blocks",
    "fig07": "How a perturbation travels",
    "fig08": "Effective width",
    "fig09": "Growth of noise, and when symmetry breaks",
    "fig10": "The operations of a machine",
    "fig11": "Wide network and quotient",
    "tab01": "Accuracies by data set",
    "abl01": "Linear or rectified skips",
    "abl02": "Survival of the first steps",
    "abl03": "Arithmetic of the device",
    "abl04": "Time to catch up",
    "abl05": "Rates of growth",
    "abl06": "LeakyNet: which string breaks first",
}

TEMPLATE = (Path(__file__).parent / "notebook.md.j2").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Notebook:
    """A notebook and its page."""

    name: str  # module or experiment
    path: Path
    page: str  # address of its page, as Markdown source
    label: str  # what the navigation calls it
    profile: str = ""  # at which a figure notebook was executed


def notebooks(root: Path = ROOT) -> list[Notebook]:
    """The library notebooks in reading order."""
    paths = {re.sub(r"^\d+[a-z]?_", "", path.stem): path for path in sorted((root / "nbs").glob("[0-9]*.ipynb"))}
    return [Notebook(name, path, f"argument/{path.stem}.md", name) for name, path in paths.items()]


def sections(root: Path = ROOT) -> dict[str, list[Notebook]]:
    """The library notebooks by what they are about, as the reading list of nbs/ divides them."""
    found = {title: [n for n in notebooks(root) if n.path.match(f"nbs/{pattern}.ipynb")]
             for title, pattern in SECTIONS.items()}
    return {title: rooms for title, rooms in found.items() if rooms}


def figure_paths(root: Path = ROOT) -> dict[str, Path]:
    """The committed figure notebooks by experiment, in the order of the experiments."""
    found = {path.stem.partition("_")[0]: path for path in sorted((root / "nbs" / "figures").glob("*.ipynb"))}
    return {name: found[name] for name in dict.fromkeys((*EXPERIMENTS, *found)) if name in found}


def label(name: str, path: Path) -> str:
    """What a figure shows, in a few words."""
    return SHOWS.get(name) or path.stem.partition("_")[2].replace("_", " ").capitalize()


def scale(profile: str) -> str:
    """What a profile is, in a few words."""
    return SCALES.get(profile, profile)


def figure_notebooks(root: Path = ROOT) -> list[Notebook]:
    """The figure notebooks: as executed at each profile where there is one, as committed otherwise."""
    found = []
    for name, path in figure_paths(root).items():
        shows, mine = label(name, path), []
        for profile in PROFILES:
            executed = files_there(name, profile, root / "figures").get("ipynb")
            about = f"{shows} ({scale(profile)})"
            if executed: mine.append(Notebook(name, executed, f"figures/{name}-{profile}.md", about, profile))
        found += mine or [Notebook(name, path, f"figures/{name}.md", shows)]
    return found


@cache
def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, 4)


def is_constant(statement: ast.stmt) -> bool:
    """Whether a name is given to a few words or numbers as they stand."""
    parts = ast.walk(statement.value) if isinstance(statement, ast.Assign) else [statement]
    return all(isinstance(part, (ast.Constant, ast.Tuple, ast.expr_context)) for part in parts)


def imports(statement: ast.stmt) -> bool:
    """Whether a statement imports, or says which of the imported names to hand on."""
    handed_on = isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "_all_"
    return handed_on or isinstance(statement, (ast.Import, ast.ImportFrom))


def fold(cell: nbformat.NotebookNode) -> str:
    """What the lid says of a cell that few readers open: imports, private helpers, parameters; else nothing."""
    tags = cell.metadata.get("tags", ())
    if "parameters" in tags or "injected-parameters" in tags: return "Parameters"
    try: statements = ast.parse(cell.source).body
    except SyntaxError: return ""  # such as a line for the shell
    if statements and all(map(imports, statements)): return "Imports"
    first = list(takewhile(is_constant, statements))  # constants go with the helpers that follow
    helpers = [getattr(s, "name", "") for s in statements[len(first):]]
    if not helpers or not all(name.startswith("_") for name in helpers): return ""
    names = [ast.unparse(s.targets[0]) for s in first] + helpers
    return "Helpers: " + ", ".join(f"<code>{name}</code>" for name in names)


def prepared(cell: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A cell without what only nbdev needs."""
    if cell.cell_type == "code":
        cell.source = DIRECTIVES.sub("", cell.source)
        cell.metadata.fold = fold(cell)
    else:  # anchors are in lower case here, and a displayed formula needs a paragraph of its own
        cell.source = re.sub(r"\]\(#([^)]+)\)", lambda found: found[0].lower(), cell.source)
        cell.source = re.sub(r"\s*(\$\$.+?\$\$)\s*", r"\n\n\1\n\n", cell.source, flags=re.DOTALL)
    return cell


def leading(cells: list) -> list:
    """The cells of a figure's notebook with the code before the first output under one lid: the figure leads."""
    before = list(takewhile(lambda cell: cell.cell_type == "code" and not cell.outputs, cells[1:]))
    first = cells[1 + len(before)]
    if first.cell_type != "code": return cells  # not executed
    first.source = "\n\n".join(cell.source for cell in [*before, first])
    first.metadata.fold = "Code of the figure"
    return [cells[0], first, *cells[2 + len(before):]]


def notebook_markdown(notebook: Notebook, root: Path = ROOT) -> str:
    """A notebook as Markdown; that of a figure with links to the files of the figure below its title."""
    shown = presentable(read(notebook.path))
    shown.cells = [prepared(cell) for cell in shown.cells if not HIDDEN.match(cell.source)]
    if notebook.page.startswith("figures/"):
        title, *rest = leading(shown.cells)
        shown.cells = [title, nbformat.v4.new_markdown_cell(links(notebook, root)), *rest]
    shown.metadata.alt = ": ".join(headline(shown))
    return MarkdownExporter(raw_template=TEMPLATE).from_notebook_node(shown)[0]


def named(name: str, profile: str, above: str, root: Path = ROOT) -> str:
    """Links to the files of a figure at a profile, as Markdown; empty if there are none."""
    kinds = files_there(name, profile, root / "figures")
    return ", ".join(f"[{KINDS[kind]}]({above}{profile}/{name}.{kind})" for kind in kinds)


def links(notebook: Notebook, root: Path = ROOT) -> str:
    """The files of a figure at every profile, those of its page first, as Markdown."""
    found = [] if notebook.profile else [f"[{KINDS['ipynb']}, as committed]({notebook.path.name})"]
    for profile in sorted(PROFILES, key=lambda profile: profile != notebook.profile):
        here = ", which this page shows" if profile == notebook.profile else ""
        if there := named(notebook.name, profile, "", root): found.append(f"{scale(profile)}{here}: {there}")
    return "Files: " + "; ".join(found) + ".\n{ .files }"


def expand(nav: list, root: Path = ROOT) -> list:
    """The navigation with its lists of notebooks, figures and modules filled in."""
    rooms = sections(root)
    argument, *machinery = ({title: [{n.label: n.page} for n in rooms[title]]} for title in rooms)
    more = {"argument.md": [*next(iter(argument.values())), *machinery],
            "figures.md": [{n.label: n.page} for n in figure_notebooks(root)],
            "reference.md": [{title: [{n.name: f"reference/{n.name}.md"} for n in rooms[title]]} for title in rooms]}
    return [{title: [pages[0], *more[pages[0]]] if isinstance(pages, list) and "..." in pages else pages
             for title, pages in item.items()} for item in nav]


def reading_list(root: Path = ROOT) -> str:
    """The library notebooks, with what each is about."""
    lines = []
    for title, rooms in sections(root).items():
        lines.append(f"## {title}\n")
        for notebook in rooms:
            node = read(notebook.path)
            body = re.sub(r"^[#>].*\n?", "", node.cells[0].source, flags=re.MULTILINE).strip()
            about = body.split("\n\n")[0].replace("\n", " ")
            lines.append(f"- **[{notebook.label}]({notebook.page})**: {headline(node)[1]}.\n\n    {about}\n")
    return "\n".join(lines)


def gallery(root: Path = ROOT) -> str:
    """Every figure that there is, at every profile, with links to its files and to its notebook's page."""
    made, parts = figure_notebooks(root), []
    for name, path in figure_paths(root).items():
        title, subtitle = headline(read(path))
        pages = {n.profile: n.page for n in made if n.name == name}
        about = subtitle[:1].upper() + subtitle[1:].rstrip(".") + ("" if subtitle.endswith("?") else ".")
        parts.append(f"## {label(name, path)}\n\n**{name}: {title}**\n\n{about}\n")
        parts += [shown(name, profile, subtitle, pages, root) for profile in PROFILES]
    return "\n".join(parts)


def shown(name: str, profile: str, subtitle: str, pages: dict[str, str], root: Path) -> str:
    """The picture of a figure at a profile, with its links, as Markdown; empty if there is none."""
    if "png" not in files_there(name, profile, root / "figures"): return ""
    page = pages.get(profile, next(iter(pages.values())))
    which = "notebook" if profile in pages else "notebook (with the outputs of another profile)"
    files = named(name, profile, "figures/", root)
    return (f"[![{name} at profile {profile}: {subtitle}](figures/{profile}/{name}.png)]({page})\n\n"
            f"Profile `{profile}` ({scale(profile)}): [{which}]({page}), {files}.\n{{ .files }}\n")


def downloads(root: Path = ROOT) -> dict[str, Path]:
    """Pictures, data and notebooks of the figures, and the citation, by their address on the site."""
    found = {f"figures/{profile}/{path.name}": path for name in figure_paths(root) for profile in PROFILES
             for path in files_there(name, profile, root / "figures").values()}
    committed = {f"figures/{n.path.name}": n.path for n in figure_notebooks(root) if not n.profile}
    return found | committed | {"CITATION.cff": root / "CITATION.cff"}


def claims() -> str:
    """The headline claims with their verdicts, and what they were measured on."""
    found = {profile: {name: table for name in offered(profile)
                       if (table := committed_table(name, profile, lying)) is not None} for profile in PROFILES}
    tables = {profile: named for profile, named in found.items() if named}
    pages = {n.name: n.page.replace(".md", ".html") for n in figure_notebooks()}
    measured = "; ".join(f"{scale(profile)}: {used}" for profile, used in devices(tables).items())
    return f"{headline_table(verdicts(tables), pages)}\n\nMeasured on: {measured}.\n{{ .files }}"


def repository(root: Path = ROOT) -> str:
    """The address of the repository, as the package's metadata have it."""
    settings = ConfigParser(delimiters=["="])
    settings.read(root / "settings.ini", encoding="utf-8")
    return settings["DEFAULT"]["git_url"]


def reference(notebook: Notebook) -> str:
    """The reference page of a module."""
    link = f"[`nbs/{notebook.path.name}`](../{notebook.page})"
    return (f"# symbreak.{notebook.name}\n\nWritten in the notebook {link}, with examples and tests.\n\n"
            f"::: symbreak.{notebook.name}\n")


def with_mathml(html: str) -> str:
    """Arithmatex's spans as MathML."""
    def replaced(found):
        text = unescape(found[2]).strip()
        return mathml(text[2:-2], display=text.startswith("\\["))
    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', replaced, html, flags=re.DOTALL)


# What mkdocs calls, in this order.

def on_config(config):
    config.nav = [*expand(config.nav), {"Repository": repository()}]
    config.extra_css = [*STYLES, *config.extra_css]
    return config


def on_files(files, config):
    from mkdocs.structure.files import File
    made = {n.page: notebook_markdown(n) for n in notebooks() + figure_notebooks()}
    made |= {f"reference/{n.name}.md": reference(n) for n in notebooks()}
    made |= {name: asset(name) for name in STYLES}
    copied = downloads()
    made |= {address: nbformat.writes(portable(read(p))) for address, p in copied.items() if p.suffix == ".ipynb"}
    for address, text in made.items():
        files.append(File.generated(config, address, content=text))
    for address in copied.keys() - made.keys():
        files.append(File.generated(config, address, abs_src_path=str(copied[address])))
    return files


FILLED = {"reading list": reading_list, "gallery": gallery, "headline claims": claims,
          "repository": lambda: f"[{repository()}]({repository()})"}

def on_page_markdown(markdown, page, config, files):
    markdown = re.sub(r"\]\(\.\./\.\./nbs/(\w+)\.ipynb", r"](../argument/\1.md", markdown)  # a file there, a page here
    return re.sub(r"<!-- ([a-z ]+) -->", lambda found: FILLED[found[1]](), markdown)


def on_post_template(output_content, template_name, config):
    # Its addresses begin at the root of a server, which the site need not be.
    return "" if template_name == "404.html" else output_content


def on_page_content(html, page, config, files):
    return with_mathml(html)
