"""The README says what the committed data say, and links to what is there."""
import re
import sys
from io import StringIO

import pandas as pd
import pytest

from symbreak.headlines import all_verdicts, claims_page, committed, readme_table
from symbreak.files import home
from symbreak.results import collect
from symbreak.summaries import break_times, linearity

ROOT = home()
sys.path.insert(0, str(ROOT / "tools"))
from write_claims import ALL_CLAIMS, README, with_table  # noqa: E402


def test_claims_are_what_the_committed_data_give():
    found, text = all_verdicts(committed), committed(README)
    assert with_table(text, readme_table(found)) == text, "run: python tools/write_claims.py"
    assert claims_page(found) == committed(ALL_CLAIMS), "run: python tools/write_claims.py"


def test_the_first_page_is_short():
    before, _ = README.read_text().split("## Where to look")
    assert len(before.splitlines()) <= 60


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), ALL_CLAIMS]), ids=lambda p: p.name)
def test_links_exist(page):
    for target in re.findall(r"\]\(([^)#: ]+)\)", page.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), f"{page.name} links to {target}"


def test_commands_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for verb in re.findall(r"^make (\w+)", README.read_text(encoding="utf-8"), re.M):
        assert f"\n{verb}:" in makefile


def test_accuracies_on_all_of_cifar10_are_those_of_the_committed_runs():
    """Written by hand: where each curve ends, which no claim says."""
    last = collect("fig04", "full").sort_values("epoch").groupby(["curve", "seed"]).test_accuracy.last()
    ends = last.groupby("curve").mean()
    curves = "hardware noise (atomic additions)", "dropout 1 %", "He init", "exact control"
    for path, digits in (("README.md", 1), ("results/README.md", 2)):
        text = " ".join((ROOT / path).read_text(encoding="utf-8").split())
        sentence = text[text.rindex("On all of CIFAR-10"):]
        said = re.findall(r"at (\d+\.\d+) %", sentence)[:4]
        assert said == [f"{100 * ends[curve]:.{digits}f}" for curve in curves], path


def fig09_table(profile): return pd.read_csv(StringIO(committed(ROOT / "figures" / profile / "fig09.csv")))


def fig09(profile):
    table = fig09_table(profile)
    measured, foretold = (table[table.source == source] for source in ("all features", "three copies"))
    return measured, (break_times(measured) - break_times(foretold)).abs()


def test_what_three_copies_foretell_is_as_good_as_is_said():
    """Written by hand: how many runs break when three copies say, which no claim counts."""
    (measured, apart), (_, on_images) = map(fig09, ("ladder", "cifar"))
    assert apart.notna().all() and 7.5 < apart.max() < 8.5 and on_images.notna().all()
    said = {"README.md": f"R² {linearity(measured).mean():.2f}"}
    for path in ("README.md", "nbs/15_prediction.ipynb"):
        text = " ".join(re.sub(r'\\n",?|"', " ", (ROOT / path).read_text(encoding="utf-8")).split())
        assert re.search(rf"\b{(apart < 3).sum()} of {len(apart)} runs\b", text) and said.get(path, "") in text, path
        assert re.search(rf"all of {len(on_images)} runs are within {on_images.max():.1f}\b", text), path


def test_what_the_gains_of_one_run_foretell_is_as_good_as_is_said():
    """Written by hand, in README: one-ulp noise within one epoch or two, atomic additions two to six later."""
    said = " ".join(README.read_text(encoding="utf-8").split())
    assert "within an epoch on CIFAR images, where it breaks at epoch 2, and within two on digits" in said
    assert "atomic additions break two to six epochs later than foretold" in said
    for profile, within in (("cifar", 1), ("quick", 2), ("ladder", 2)):
        table = fig09_table(profile)
        gains = table[table.source == "three copies, gains of one run"]

        def later(source):  # epochs, by seed
            rows = table[table.source == source]
            eps = rows.noise.max()
            foretold = gains.assign(asymmetry=gains.asymmetry * eps / gains.noise, noise=eps)
            return break_times(rows) - break_times(foretold) if len(rows) else pd.Series(dtype=float)
        one_ulp, atomic = map(later, ("one-ulp gradient noise", "hardware noise (atomic additions)"))
        assert (one_ulp.abs() < within).all() and len(one_ulp) == 3, profile
        assert atomic.between(1.9, 6.3).all() and len(atomic) == (0 if profile == "quick" else 3), profile
