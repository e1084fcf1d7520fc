"""Variants of a figure: made by the same code, and never taken for the figure itself."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from symbreak import cli
from symbreak.campaign import run
from symbreak.claims import verdicts
from symbreak.experiments import Request, offered, plan
from symbreak.figures import figure_files
from symbreak.headlines import all_verdicts, lying
from symbreak.profiles import PROFILES, variant
from symbreak.results import everywhere, reproduce
from symbreak.runs import Store

SMALL = dict(train_size=20, test_size=20, epochs=1)
NAME = "quick+train_size=20+test_size=20+epochs=1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a variant of abl01, made from the command line."""
    folder = tmp_path_factory.mktemp("variant")
    options = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "symbreak", "reproduce", "abl01", *options, "--strict",
               "--runs", folder / "runs", "--out", folder / "figures"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_variant_has_a_folder_a_title_and_a_small_print_of_its_own(made):
    folder, done = made
    assert [path.name for path in (folder / "figures").iterdir()] == [NAME]
    files = figure_files("abl01", NAME, folder / "figures")
    assert files.is_whole() and json.loads(files.path("json").read_text())["provenance"]["profile"] == NAME
    told = "variant of profile quick with train_size=20, test_size=20, epochs=1"
    assert f"Nothing is claimed of a {told}." in done.stdout and "Claims" not in done.stdout
    notebook = json.loads(files.path("ipynb").read_text())
    assert f'profile = "{NAME}"' in ["".join(c["source"]).split("\n")[1] for c in notebook["cells"]
                                     if "injected-parameters" in c["metadata"].get("tags", [])]


def test_from_python_it_is_the_same_and_up_to_date(made, capsys):
    folder, _ = made
    tables = run(["abl01"], runs=folder / "runs", out=folder / "figures", changes=SMALL)
    assert "abl01: up to date" in capsys.readouterr().err and tables["abl01"].epoch.max() == 1
    store = Store(folder / "runs")
    table = reproduce("abl01", variant("quick", SMALL), store=store)
    pd.testing.assert_frame_equal(table, tables["abl01"])
    assert verdicts("abl01", table, NAME).empty and len(verdicts("abl01", table)) > 0


def test_no_page_knows_of_a_variant(made, capsys, tmp_path, monkeypatch):
    folder, _ = made
    monkeypatch.setenv("SYMBREAK_RUNS", str(folder / "runs"))
    before = all_verdicts()
    def with_variants(path):
        assert "+" not in str(path), path
        return lying(path)
    pd.testing.assert_frame_equal(all_verdicts(with_variants), before)
    assert cli.main(["report", "--profile", NAME, "--out", str(tmp_path)]) == 2
    assert f"profile: '{NAME}'; allowed: quick" in capsys.readouterr().err
    assert cli.main(["list"]) == 0
    assert "quick+" not in capsys.readouterr().out


def test_what_gathers_all_profiles_shows_of_a_variant_nothing_else(tmp_path):
    store, request = Store(tmp_path), Request("tab01", NAME)
    for planned in plan(request): store.train(planned.config)
    assert set(everywhere(request, store).profile) == {NAME}
    with pytest.raises(ValueError, match="No objects"): everywhere(Request("tab01"), store)  # finished nowhere else


@pytest.mark.parametrize("options, says", [
    (["fig04", "--set", "widht=1"], "set: unknown field 'widht'; allowed: data, "),
    (["fig04", "--set", "width"], "set: 'width'; allowed: FIELD=VALUE, such as width=1"),
    (["fig04", "--set", "width=two"], "set: width=two; allowed: int"),
    (["fig04", "--set", "width=0"], "width: 0; allowed: at least 1"),
    (["fig04", "--set", "width=1", "--set", "width=3"], "set: 'width' twice; allowed: once"),
    (["fig04", "--set", "width=2"], "set: width=2 is what fig04 has at profile quick anyway"),
    (["fig04", "--set", "data=mnist"], "set: data=mnist, but that is the option data"),
    (["fig04", "--set", "seed=1"], "set: seed=1, but every curve has seeds 0, 1, ..."),
    (["fig03", "--set", "width=1"], "set: fig03 is measured without training"),
    (["fig04", "--set", "dropout=0.05"], "set: dropout=0.05, but that is what the runs of fig04 differ in"),
    (["fig04", "--set", "deterministic=true"], "set: deterministic=True, but that is what the runs of fig04 differ in"),
    (["fig04", "--slurm", "partition=gpu"], "slurm: 'partition=gpu' without an engine; allowed: with --engine"),
    (["abl03", "--set", "epochs=9"], "set: epochs=9, but no run of abl03 takes it"),
    (["--set", "momentum=0.9"], "set: no figure has other runs"),
])
def test_what_is_no_variant_is_refused_before_anything_is_made(capsys, tmp_path, options, says):
    assert cli.main(["reproduce", *options, "--runs", f"{tmp_path}/runs", "--out", f"{tmp_path}/figures"]) == 2
    assert says in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("profile", PROFILES)
def test_a_variant_has_the_curves_of_the_figure(profile):
    figure = "fig04" if "fig04" in offered(profile) else offered(profile)[0]
    ours, theirs = (plan(Request(figure, name)) for name in (f"{profile}+weight_decay=0.25", profile))
    assert [(p.curve, p.config.seed) for p in ours] == [(p.curve, p.config.seed) for p in theirs]
    assert {p.config.weight_decay for p in ours} == {0.25} and not {p.config for p in ours} & {p.config for p in theirs}


@pytest.mark.parametrize("engine", [[], ["--engine", "local"]])
def test_an_interrupted_campaign_says_where_each_of_its_runs_goes_on(tmp_path, engine):
    command = [sys.executable, "-m", "symbreak", "reproduce", "abl01", "--set", "lr=0.06", "--workers", "2",
               "--runs", tmp_path / "runs", "--out", tmp_path / "figures", *engine]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(list(Path(tmp_path, "runs").glob("*/checkpoint.pt"))) < 2: time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].splitlines()[-1]
    assert process.returncode == 130 and said.startswith("symbreak: interrupted; the same command goes on after epoch ")
    assert said.count("of 60 (one-ulp gradient noise, ") == said.count("after epoch") == 2 and ", seed 0)" in said
