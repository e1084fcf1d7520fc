"""The README says what the committed data say, and links to what is there."""
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from readme_claims import ALL_CLAIMS, README, ROOT, all_claims, committed, with_claims  # noqa: E402


def test_claims_are_what_the_committed_data_give():
    text = committed(README)
    assert with_claims(text, committed) == text, "run: python tests/readme_claims.py"
    assert all_claims(committed) == committed(ALL_CLAIMS), "run: python tests/readme_claims.py"


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), ALL_CLAIMS]), ids=lambda p: p.name)
def test_links_exist(page):
    for target in re.findall(r"\]\(([^)#: ]+)\)", page.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), f"{page.name} links to {target}"


def test_commands_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for verb in re.findall(r"^make (\w+)", README.read_text(encoding="utf-8"), re.M):
        assert f"\n{verb}:" in makefile
