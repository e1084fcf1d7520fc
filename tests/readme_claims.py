"""The claims table of the README, computed from the data of figures/quick. `python tests/readme_claims.py` writes it.

The test compares it with the *committed* data, since `make reproduce` puts this machine's own into the working tree.
"""
import io
import json
import subprocess
from pathlib import Path

import pandas as pd

from symbreak.claims import check
from symbreak.experiments import EXPERIMENTS

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
START, END = "<!-- claims: start -->\n", "<!-- claims: end -->"


def committed(path: Path) -> str:
    """A file as it was committed, or as it lies there where git cannot tell."""
    name = path.relative_to(ROOT).as_posix()
    shown = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True, text=True)
    return shown.stdout if shown.returncode == 0 else path.read_text(encoding="utf-8")


def load(path: Path, read) -> pd.DataFrame:
    """Tidy data as `plots.save` wrote it, with its provenance."""
    table = pd.read_csv(io.StringIO(read(path)))
    table.attrs.update(json.loads(read(path.with_suffix(".json"))))
    return table


def claims_markdown(read=Path.read_text) -> str:
    """The table, and under it where its numbers come from."""
    tables = {name: load(ROOT / "figures" / "quick" / f"{name}.csv", read) for name in EXPERIMENTS}
    rows = pd.concat([check(name, table, "quick") for name, table in tables.items()], ignore_index=True)
    lines = ["| figure | claim | band | measured, mean ± sd | seeds | verdict |", "|---|---|---|---|---|---|"]
    lines += [f"| {r.figure} | {r.statement} | {r.band} | {r.measured} | {r.seeds} | {'**not reproduced**' if r.verdict == 'not reproduced' else r.verdict} |"
              for r in rows.itertuples()]
    sources = [table.attrs["provenance"] for table in tables.values()]
    def all_of(key): return ", ".join(sorted({value for s in sources for value in s[key] if value}))
    lines += ["", f"Profile `quick`: {all_of('data')}; {all_of('device')}; torch {all_of('torch')}."]
    return "\n".join(lines) + "\n"


def with_claims(readme: str, read=Path.read_text) -> str:
    """The README with its table replaced."""
    before, rest = readme.split(START)
    return before + START + claims_markdown(read) + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(with_claims(README.read_text(encoding="utf-8")), encoding="utf-8")
