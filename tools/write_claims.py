"""Write the table of README.md and the page of all claims, figures/README.md, from the data in figures/ and results/.

    python tools/write_claims.py

A test compares both with the *committed* data, since `make reproduce` puts this machine's own into the working tree.
"""
from pathlib import Path

from symbreak.headlines import all_verdicts, claims_page, readme_table

ROOT = Path(__file__).resolve().parents[1]
README, ALL_CLAIMS = ROOT / "README.md", ROOT / "figures" / "README.md"
START, END = "<!-- claims: start -->\n", "<!-- claims: end -->"


def with_table(readme: str, table: str) -> str:
    """The README with its table replaced."""
    before, rest = readme.split(START)
    return before + START + table + END + rest.split(END)[1]


if __name__ == "__main__":
    found = all_verdicts()
    README.write_text(with_table(README.read_text(encoding="utf-8"), readme_table(found)), encoding="utf-8")
    ALL_CLAIMS.write_text(claims_page(found), encoding="utf-8")
