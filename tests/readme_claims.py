"""The claims table of the README, computed from the committed data of figures/quick. `python tests/readme_claims.py` writes it."""
import json
from pathlib import Path

import pandas as pd

from symbreak.claims import check

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
START, END = "<!-- claims: start -->\n", "<!-- claims: end -->"


def load(path: Path) -> pd.DataFrame:
    """Tidy data as `plots.save` wrote it, with its provenance."""
    table = pd.read_csv(path)
    table.attrs.update(json.loads(path.with_suffix(".json").read_text()))
    return table


def claims_markdown() -> str:
    """The table, and under it where its numbers come from."""
    tables = {path.stem: load(path) for path in sorted((ROOT / "figures" / "quick").glob("*.csv"))}
    rows = pd.concat([check(name, table, "quick") for name, table in tables.items()], ignore_index=True)
    lines = ["| figure | claim | band | measured, mean ± sd | seeds | verdict |", "|---|---|---|---|---|---|"]
    lines += [f"| {r.figure} | {r.statement} | {r.band} | {r.measured} | {r.seeds} | {'**not reproduced**' if r.verdict == 'not reproduced' else r.verdict} |"
              for r in rows.itertuples()]
    sources = [table.attrs["provenance"] for table in tables.values()]
    def all_of(key): return ", ".join(sorted({value for s in sources for value in s[key]}))
    lines += ["", f"Profile `quick`: {all_of('data')}; {all_of('device')}; torch {all_of('torch')}."]
    return "\n".join(lines) + "\n"


def with_claims(readme: str) -> str:
    """The README with its table replaced."""
    before, rest = readme.split(START)
    return before + START + claims_markdown() + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(with_claims(README.read_text(encoding="utf-8")), encoding="utf-8")
