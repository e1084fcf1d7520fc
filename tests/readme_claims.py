"""The claims in README.md (headlines) and figures/README.md (all), computed from the data in figures/ and, of a figure that still lacks runs, from results/.
`python tests/readme_claims.py` writes both.

The test compares them with the *committed* data, since `make reproduce` puts this machine's own into the working tree.
"""
import io
import json
import subprocess
from pathlib import Path

import pandas as pd

from symbreak.claims import CLAIMS, NOT_REPRODUCED, NOT_TESTED, check
from symbreak.experiments import EXPERIMENTS, PROFILES, collect
from symbreak.runs import Store

ROOT = Path(__file__).resolve().parents[1]
README, ALL_CLAIMS = ROOT / "README.md", ROOT / "figures" / "README.md"
START, END = "<!-- claims: start -->\n", "<!-- claims: end -->"


def committed(path: Path) -> str | None:
    """A file as it was committed, or as it lies there where there is no git; None if there is no such file."""
    inside = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True)
    if inside.returncode: return lying(path)
    shown = subprocess.run(["git", "show", f"HEAD:{path.relative_to(ROOT).as_posix()}"], cwd=ROOT, capture_output=True, text=True)
    return None if shown.returncode else shown.stdout


def lying(path: Path) -> str | None:
    """A file as it lies in the working tree."""
    return path.read_text(encoding="utf-8") if path.exists() else None


def load(profile: str, name: str, read) -> pd.DataFrame | None:
    """Tidy data as `plots.save` wrote it, with its provenance, or what is there of a figure that could not be drawn yet."""
    path = ROOT / "figures" / profile / f"{name}.csv"
    if (text := read(path)) is None: return archived(profile, name)
    table = pd.read_csv(io.StringIO(text))
    table.attrs.update(json.loads(read(path.with_suffix(".json"))))
    return table


def archived(profile: str, name: str) -> pd.DataFrame | None:
    """The runs of a figure that lie in results/, all of which are committed."""
    table = collect(name, profile, store=Store(ROOT / "no such folder", tuple(sorted(p for p in (ROOT / "results").iterdir() if p.is_dir()))))
    return table if len(table) else None


def judged(read) -> dict[str, pd.DataFrame]:
    """Profile -> its claims with verdicts, for the profiles of which something is finished; attrs say where the numbers come from."""
    found = {}
    for profile in PROFILES:
        tables = {name: table for name in EXPERIMENTS if (table := load(profile, name, read)) is not None}
        if not tables: continue
        found[profile] = pd.concat([check(name, table, profile) for name, table in tables.items()], ignore_index=True)
        sources = [table.attrs["provenance"] for table in tables.values()]
        data, device, torch = (", ".join(sorted({v for s in sources for v in s[key] if v})) for key in ("data", "device", "torch"))
        found[profile].attrs["source"] = f"{data}; {device}; torch {torch}"
    return found


def markdown(rows: list[list[str]], columns: list[str]) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in (columns, ["---"] * len(columns), *rows))


def verdict(row) -> str:
    return f"**{row.verdict}**" if row.verdict == NOT_REPRODUCED else row.verdict


def headlines(read=lying) -> str:
    """The few claims that stand for the rest, a column for each profile."""
    found = judged(read)
    by_claim = {profile: {(row.statement, row.band): row for row in table.itertuples()} for profile, table in found.items()}
    rows = []
    for (statement, band), claim in {(c.statement, c.band): c for c in CLAIMS if c.headline}.items():
        meant = {profile for c in CLAIMS if (c.statement, c.band) == (statement, band) for profile in c.profiles}
        cells = {profile: rows_of.get((statement, band)) for profile, rows_of in by_claim.items()}
        if any(cells.values()):
            rows.append([claim.figure, statement, band, *(f"{cell.measured}, {verdict(cell)}" if cell and cell.verdict != NOT_TESTED
                                                          else NOT_TESTED if profile in meant else "" for profile, cell in cells.items())])
    sources = "".join(f"`{profile}`: {table.attrs['source']}.  \n" for profile, table in found.items())
    return markdown(rows, ["figure", "claim", "band", *(f"`{profile}`" for profile in found)]) + "\n" + sources


def all_claims(read=lying) -> str:
    """The page with every claim at every profile."""
    parts = ["# All claims\n\nA claim is *reproduced* if the mean over seeds, give or take its standard error, lies in the band beside it. Made by `python tests/readme_claims.py` "
             "from the data beside the figures and, for figures that still lack runs, from `results/`.\n"]
    for profile, table in judged(read).items():
        rows = [[r.figure, r.statement, r.band, r.measured or "-", str(r.seeds), verdict(r)] for r in table.itertuples()]
        parts.append(f"\n## Profile `{profile}`\n\n{PROFILES[profile].says[0].upper()}{PROFILES[profile].says[1:]}. Measured on: {table.attrs['source']}.\n\n"
                     + markdown(rows, ["figure", "claim", "band", "measured, mean ± sd", "seeds", "verdict"]))
    return "".join(parts)


def with_claims(readme: str, read=lying) -> str:
    """The README with its table replaced."""
    before, rest = readme.split(START)
    return before + START + headlines(read) + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(with_claims(lying(README)), encoding="utf-8")
    ALL_CLAIMS.write_text(all_claims(), encoding="utf-8")
