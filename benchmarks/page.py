"""The page of results: what stands between the marks of a table is replaced when it is measured again."""
from pathlib import Path

PAGE = Path(__file__).with_name("README.md")


def write(name: str, table: str, small_print: str) -> None:
    """Put a Markdown table, and where it was measured, between the marks of that name."""
    begin, end = (f"<!-- {name}: {what} -->" for what in ("start", "end"))
    before, rest = PAGE.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    PAGE.write_text(f"{before}{begin}\n{table}\n\n{small_print}\n{end}{after}", encoding="utf-8")
