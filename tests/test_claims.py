"""Claims, plans and tables agree: what a claim selects is planned, and what is planned never changes its hash."""
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from symbreak import claims, experiments, measurements
from symbreak.claims import CLAIMS, verdicts
from symbreak.config import Config
from symbreak.experiments import EXPERIMENTS, Experiment, Request, last_row, offered, outline, plan
from symbreak.figures import figure_files, read_table
from symbreak.files import home
from symbreak.plans import IS_X86, Planned
from symbreak.profiles import PROFILES
from symbreak.results import collect, reproduce
from symbreak.runs import Store, default_store
from symbreak.summaries import at_end, gap, having, twin_gaps
from symbreak.verdicts import NOT_REPRODUCED, NOT_TESTED, Claim, is_ready, judge

HASHES = json.loads((Path(__file__).parent / "hashes.json").read_text())
MEANT = [(claim, profile) for claim in CLAIMS for profile in PROFILES
         if claim.is_meant_for(profile) and claim.figure in offered(profile)]


@pytest.mark.parametrize("claim, profile", MEANT, ids=lambda x: x if isinstance(x, str) else x.figure)
def test_rows_of_every_claim_are_planned(claim, profile):
    assert not is_ready(claim, pd.DataFrame(), outline(Request(claim.figure, profile)))  # raises for rows that are not


def described(claim):
    """A claim in one line: what is measured on which rows, the band, and where."""
    return " | ".join([claim.figure, claim.statement, f"{claim.low:g} to {claim.high:g}", ", ".join(claim.profiles),
                       " - ".join(map(str, claim.rows))])


def test_no_claim_is_changed_by_accident():
    """Whoever moves a band, or asks other rows, writes it into claims.txt, where everybody sees it."""
    agreed = (Path(__file__).parent / "claims.txt").read_text(encoding="utf-8").splitlines()
    if not IS_X86: agreed = [line for line in agreed if "AVX2" not in line]  # which other processors have not
    assert [described(claim) for claim in CLAIMS] == agreed


def test_what_abl04_says_of_real_images_is_what_was_measured():
    gaps = twin_gaps(read_table(figure_files("abl04", "cifar"))).pivot(index="width", columns="epochs", values="gap")
    assert list(gaps.columns) == [15, 30, 60] and list(gaps.index) == [1, 2, 3]
    wide = gaps.loc[2:]
    assert (wide[30] > wide[15] + 0.01).all() and (wide[60] < wide[30] - 0.01).all() and (wide[60] > 0.1).all()
    assert abs(gaps.loc[2, 60] - gaps.loc[2, 15]) < 0.005 and (gaps.loc[1] < 0.05).all()
    store = Store(home() / "no such folder", [home() / "results" / "cifar"])
    runs = [store.load(p.config) for p in plan(Request("abl04", "cifar")) if p.config.dropout]
    assert all(run.history.set_index("epoch").distinct_features[2] == 64 * run.config.width for run in runs)


@pytest.mark.parametrize("wrong", [dict(init="hee"), dict(breaker="dropouts"), dict(inti="he")], ids=str)
def test_a_misspelt_claim_is_an_error(wrong):
    table = collect("fig04", "cifar", store=Store(Path("nowhere"), default_store().archives))
    claim = Claim("fig04", "misspelt", at_end("test_accuracy"), (wrong,))
    with pytest.raises(ValueError, match="not planned|no column 'inti'"):
        judge(claim, table, outline(Request("fig04", "cifar")), seeds=3)


def test_what_shows_a_measurement_is_no_part_of_its_source():
    """Rooms after `measurements` are left out of the digest, and only they."""
    rooms = [path.stem.partition("_") for path in (home() / "nbs").glob("[0-9]*.ipynb")]
    assert {module for number, _, module in rooms if number > "22"} | {"_modidx"} == set(measurements.SHOWING)


def test_hashes_of_planned_runs_never_change():
    """Whoever plans more runs of an experiment that is listed lists theirs too."""
    for key, hashes in HASHES.items():
        profile, name = key.split("/")
        assert {p.config.hash for p in plan(Request(name, profile))} == set(hashes), key


def test_committed_runs_have_the_hashes_of_their_configurations():
    """A new field of Config, or another default, must not hide what was trained before."""
    folders = [path.parent for path in (home() / "results").glob("*/*/config.json")]
    assert folders
    for folder in folders:
        assert Config.from_dict(json.loads((folder / "config.json").read_text())).hash == folder.name


def test_results_of_the_repository_are_found():
    """Figures of `cifar` need no training: every run that they plan is committed, but for what takes days."""
    store = Store(Path("nowhere"), default_store().archives)
    wanted = set(EXPERIMENTS) - {"abl04", "abl05", "abl06", "fig09"}
    missing = {name: collect(name, "cifar", store=store).attrs["missing"] for name in wanted}
    assert missing == dict.fromkeys(wanted, 0)


def test_columns_of_facts_are_in_every_table():
    for name in ("fig04", "fig06", "fig07", "abl01", "abl02", "abl03"):
        table, planned = collect(name, "cifar", store=Store(Path("nowhere"),
                                                            default_store().archives)), outline(Request(name, "cifar"))
        assert set(planned) <= set(table), name
        assert not table[list(planned)].isna().any().any(), name


def test_a_busy_machine_contradicts_no_claim_of_the_probe():
    """Races may show or not: with none at all every verdict of the committed probe is what it was."""
    table = read_table(figure_files("fig10", "quick"))
    quiet = table.assign(deterministic=True)
    for found in (table, quiet): assert (verdicts("fig10", found).verdict == verdicts("fig10", table).verdict).all()
    assert having(deterministic=False)(quiet).eq(0).all()
    noisy = verdicts("fig10", table.assign(deterministic=False))
    assert (noisy.verdict[noisy.statement.str.contains("a rerun has other bits")] == NOT_REPRODUCED).all()


def test_adding_an_experiment(tmp_path, monkeypatch):
    """As CONTRIBUTING shows it: a plan with its columns, and claims that name them; nothing else knows of it."""
    def batches_plan(profile):
        small = replace(profile.base, width=1, epochs=1, train_size=128, test_size=50, measure_every=1)
        return [Planned(f"batch {size}", replace(small, batch_size=size)) for size in (32, 64)]

    batch_claim = Claim("toy01", "small batches are not much worse", gap, (dict(batch_size=64), dict(batch_size=32)),
                        high=1.,
                        profiles=("quick",))
    monkeypatch.setitem(experiments.EXPERIMENTS, "toy01", Experiment("Batches", batches_plan, last_row,
                                                                     ("batch_size",)))
    monkeypatch.setattr(claims, "CLAIMS", [batch_claim])
    store = Store(tmp_path)
    assert verdicts("toy01", collect("toy01", store=store)).verdict.tolist() == [NOT_TESTED]
    table = reproduce("toy01", store=store)
    assert table.groupby("batch_size").size().to_dict() == {32: 3, 64: 3}
    assert verdicts("toy01", table).seeds.tolist() == [3]
