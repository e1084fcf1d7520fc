"""Write nbs/README.md: the notebooks in reading order, with what each is about. `make lab` opens on it."""
from pathlib import Path

import nbformat

NBS = Path(__file__).resolve().parents[1] / "nbs"
SECTIONS = {"The argument": "0*", "The machinery of a run": "1*", "Experiments, and what they show": "2*",
            "What a user touches": "3*",
            "Figures": "figures/fig*", "Tables": "figures/tab*", "Ablations": "figures/abl*"}


def entry(path: Path) -> str:
    """A line that links a notebook, with the subtitle of a room or the title of a figure."""
    title, subtitle = nbformat.read(path, 4).cells[0].source.splitlines()[:2]
    if path.parent == NBS: return f"- [{path.stem}]({path.name}): {subtitle.removeprefix('> ')}"
    return f"- [{path.stem.partition('_')[0]}](figures/{path.name}): {title.removeprefix('# ')}"


def reading_order() -> str:
    """The text of nbs/README.md."""
    parts = ["# The notebooks in reading order\n"]
    for title, pattern in SECTIONS.items():
        parts.append("\n".join([f"## {title}\n", *map(entry, sorted(NBS.glob(f"{pattern}.ipynb"))), ""]))
    return "\n".join([*parts, "Made from the titles of the notebooks by `python tools/reading_order.py`.\n"])


if __name__ == "__main__":
    (NBS / "README.md").write_text(reading_order(), encoding="utf-8")
