"""What the site takes from the notebooks: a page for each, in reading order, a gallery of figures, a reference page per module.

mkdocs calls the functions `on_*`. Notebooks become Markdown by nbconvert, so that the theme treats them like any other page; formulas
become MathML, which needs no script. Nothing is executed here.
"""
import re
from dataclasses import dataclass
from functools import cache
from html import unescape
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

from symbreak.experiments import EXPERIMENTS
from symbreak.report import headline, mathml

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ("quick", "cifar", "paper")
HIDDEN = re.compile(r"#\|\s*(hide|default_exp)\b")
DIRECTIVES = re.compile(r"^#\|.*\n?", re.MULTILINE)

TEMPLATE = """{%- extends 'markdown/index.md.j2' -%}
{%- block input -%}
{%- if cell.source.strip() %}
````python
{{ cell.source }}
````
{% endif -%}
{%- endblock input -%}
{%- block stream %}
```` { .text .output .no-copy }
{{ output.text | strip_ansi }}
````
{% endblock stream -%}
{%- block data_text scoped %}
```` { .text .output .no-copy }
{{ output.data['text/plain'] | strip_ansi }}
````
{% endblock data_text -%}
{%- block data_png %}
<img class="figure" alt="{{ nb.metadata.alt | escape }}" src="data:image/png;base64,{{ output.data['image/png'] | replace('\\n', '') }}">
{% endblock data_png -%}
{%- block data_html scoped %}
<div class="output-table" tabindex="0" markdown="0">{{ output.data['text/html'] | without_style }}</div>
{% endblock data_html -%}
"""


@dataclass(frozen=True)
class Notebook:
    """A notebook and its page."""

    path: Path
    page: str  # address of its page, as Markdown source
    label: str  # what the navigation calls it

    @property
    def module(self) -> str:
        """The module that a library notebook exports."""
        return re.sub(r"^\d+[a-z]?_", "", self.path.stem)


def notebooks(root: Path = ROOT) -> list[Notebook]:
    """The library notebooks in reading order."""
    paths = sorted((root / "nbs").glob("[0-9]*.ipynb"))
    return [Notebook(path, f"argument/{path.stem}.md", re.sub(r"^\d+[a-z]?_", "", path.stem)) for path in paths]


def figure_paths(root: Path = ROOT) -> list[Path]:
    """The committed figure notebooks, in the order of the experiments."""
    order = {name: place for place, name in enumerate(EXPERIMENTS)}
    return sorted((root / "nbs" / "figures").glob("*.ipynb"), key=lambda path: (order.get(path.stem.partition("_")[0], len(order)), path.stem))


def figure_notebooks(root: Path = ROOT) -> list[Notebook]:
    """The figure notebooks: as executed at each profile where there is one, as committed otherwise."""
    found = []
    for path in figure_paths(root):
        name = path.stem.partition("_")[0]
        executed = [(profile, root / "figures" / profile / f"{name}.ipynb") for profile in PROFILES]
        pages = [Notebook(p, f"figures/{name}-{profile}.md", f"{name} ({profile})") for profile, p in executed if p.exists()]
        found += pages or [Notebook(path, f"figures/{name}.md", name)]
    return found


@cache
def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, 4)


def without_style(html: str) -> str:
    """Tables as pandas writes them, without their own style sheet and border."""
    html = re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)
    return re.sub(r"\n\s*", "", re.sub(r' (border="1"|style="text-align: right;")', "", html))


def notebook_markdown(notebook: Notebook) -> str:
    """A notebook as Markdown, without what only nbdev and papermill need."""
    shown = nbformat.from_dict(read(notebook.path))
    shown.cells = [cell for cell in shown.cells if not HIDDEN.match(cell.source)]
    for cell in shown.cells:
        if cell.cell_type == "code":
            cell.source = DIRECTIVES.sub("", cell.source)
        else:  # anchors are in lower case here, and a displayed formula needs a paragraph of its own
            cell.source = re.sub(r"\]\(#([^)]+)\)", lambda found: found[0].lower(), cell.source)
            cell.source = re.sub(r"\s*(\$\$.+?\$\$)\s*", r"\n\n\1\n\n", cell.source, flags=re.DOTALL)
        if "injected-parameters" in cell.metadata.get("tags", ()):
            cell.source = re.sub(r"^out = .*\n?", "", cell.source, flags=re.MULTILINE)
    shown.metadata.alt = ": ".join(headline(shown))
    exporter = MarkdownExporter(raw_template=TEMPLATE, filters={"without_style": without_style})
    return exporter.from_notebook_node(shown)[0]


def expand(nav: list, root: Path = ROOT) -> list:
    """The navigation with its lists of notebooks, figures and modules filled in."""
    more = {"argument.md": [{n.label: n.page} for n in notebooks(root)],
            "figures.md": [{n.label: n.page} for n in figure_notebooks(root)],
            "reference.md": [{n.module: f"reference/{n.module}.md"} for n in notebooks(root)]}
    return [{title: [pages[0], *more[pages[0]]] if isinstance(pages, list) and "..." in pages else pages
             for title, pages in item.items()} for item in nav]


def reading_list(root: Path = ROOT) -> str:
    """The library notebooks, with what each is about."""
    lines = []
    for number, notebook in enumerate(notebooks(root), 1):
        node = read(notebook.path)
        body = re.sub(r"^[#>].*\n?", "", node.cells[0].source, flags=re.MULTILINE).strip().split("\n\n")[0].replace("\n", " ")
        lines.append(f"{number}. **[{notebook.label}]({notebook.page})**: {headline(node)[1]}.\n\n    {body}\n")
    return "\n".join(lines)


def gallery(root: Path = ROOT) -> str:
    """Every figure that there is, at every profile, with a link to its notebook: as executed at that profile, or else as committed."""
    pages = {Path(n.page).stem: n.page for n in figure_notebooks(root)}
    parts = []
    for path in figure_paths(root):
        title, subtitle = headline(read(path))
        name = path.stem.partition("_")[0]
        mine = {profile: page for profile in ("", *PROFILES) if (page := pages.get(f"{name}-{profile}".strip("-")))}
        parts.append(f"## {name}: {title}\n\n{subtitle[:1].upper()}{subtitle[1:].rstrip('.')}{'' if subtitle.endswith('?') else '.'}\n")
        for profile in PROFILES:
            if (root / "figures" / profile / f"{name}.png").exists():
                page = mine.get(profile, next(iter(mine.values())))
                which = "the notebook" if profile in mine else "the notebook (its outputs are those of another profile)"
                parts.append(f"Profile `{profile}`, [{which}]({page}):\n\n[![{name} at profile {profile}: {subtitle}](figures/{profile}/{name}.png)]({page})\n")
    return "\n".join(parts)


def pictures(root: Path = ROOT) -> dict[str, Path]:
    """Pictures by their address on the site."""
    return {f"figures/{p.parent.name}/{p.name}": p for profile in PROFILES for p in sorted((root / "figures" / profile).glob("*.png"))}


def reference(notebook: Notebook) -> str:
    """The reference page of a module."""
    link = f"[`nbs/{notebook.path.name}`](../{notebook.page})"
    return f"# symbreak.{notebook.module}\n\nWritten in the notebook {link}, with examples and tests.\n\n::: symbreak.{notebook.module}\n"


def with_mathml(html: str) -> str:
    """Arithmatex's spans as MathML."""
    def replaced(found):
        text = unescape(found[2]).strip()
        return mathml(text[2:-2], display=text.startswith("\\["))
    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', replaced, html, flags=re.DOTALL)


# What mkdocs calls, in this order.

def on_config(config):
    config.nav = expand(config.nav)
    return config


def on_files(files, config):
    from mkdocs.structure.files import File
    made = {n.page: notebook_markdown(n) for n in notebooks() + figure_notebooks()}
    made |= {f"reference/{n.module}.md": reference(n) for n in notebooks()}
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    for address, path in pictures().items():
        files.append(File.generated(config, address, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    return markdown.replace("<!-- reading list -->", reading_list()).replace("<!-- gallery -->", gallery())


def on_page_content(html, page, config, files):
    return with_mathml(html)
