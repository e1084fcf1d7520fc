"""Mutants of the library: small faults, one at a time, each of which what guards its module ought to catch.

    python tools/mutants.py sample [--places 14] [--seed 0] [MODULE ...]   try some, and list those that nothing caught
    python tools/mutants.py guard MODULE                                   what each of them must pass

cosmic-ray makes the mutants and keeps the books, in build/mutants/. Of each module a seeded sample of places in its
code is drawn, and of each place one mutant. It is tried in a copy of this clone, so nothing changes here, against the
module's own notebook, as `make test` executes it, and then against the files of tests/ that concern the module. A
mutant with which the module cannot even be imported is no test of the tests: it is not counted.
"""
import argparse
import importlib
import os
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "mutants"
GUARDS = {  # module -> files of tests/ that concern it, the quickest first
    "quotient": "any_input quotient",
    "breaking": "nothing_moved recipe breaking",
    "diversity": "diversity any_input nothing_moved quotient",
    "train": "nothing_moved recipe train",
    "records": "any_input damage cli train",
    "runs": "recipe runs",
    "images": "data damage train",
    "journal": "damage train",
    "outcome": "damage runs train",
    "claims": "readme claims",
    "growth_claims": "readme claims",
    "verdicts": "readme claims report",
    "summaries": "readme claims",
}
STILLBORN = "cannot be imported"
CELL = re.compile(r"^# %% (\S+) #(\w+)\n", re.MULTILINE)
SETTINGS = """[cosmic-ray]
module-path = "symbreak/{module}.py"
timeout = {timeout}
excluded-modules = []
test-command = "{python} tools/mutants.py guard {module}"
distributor.name = "local"
"""


# what a mutant must pass

def cells(module: Path) -> dict[str, str]:
    """The code of a library module, by the cell that it was exported from."""
    parts = CELL.split(module.read_text(encoding="utf-8"))
    return {name: code.strip("\n") for name, code in zip(parts[2::3], parts[3::3])}


def carry_over(module: str) -> Path:
    """The notebook of a module, with the cells in which the module differs from the one that was copied."""
    path = next(ROOT.glob(f"nbs/*_{module}.ipynb"))
    mutated, copied = (cells(root / "symbreak" / f"{module}.py") for root in (ROOT, ROOT / "copied"))
    notebook = nbformat.read(ROOT / "copied" / "nbs" / path.name, 4)
    for cell in notebook.cells:
        if mutated.get(cell.id) != copied.get(cell.id):
            cell.source = "#| export\n" + re.sub(r"from \.", "from symbreak.", mutated[cell.id])
    nbformat.write(notebook, path)
    return path


def guard(module: str) -> None:
    """Exit with an error that says what is wrong with a mutant; one process for all, since starting takes longest."""
    os.environ |= dict(PYTHONPATH=str(ROOT), IN_TEST="1")  # for kernels, and for nbdev_export() in a notebook
    sys.path.insert(0, str(ROOT))
    try: importlib.import_module(f"symbreak.{module}")
    except Exception as error: sys.exit(print(f"{STILLBORN}: {error!r}") or 1)
    import pytest
    from notebooks import attempt, test
    if wrong := attempt(test, carry_over(module)): sys.exit(print(*wrong, sep="\n") or 1)
    tests = [f"tests/test_{name}.py" for name in GUARDS[module].split()]
    sys.exit(pytest.main(["-qx", "--no-header", "-p", "no:cacheprovider", *tests]))


# a sample of them

def copy(module: str) -> Path:
    """A copy of this clone as it stands, and in its folder `copied` the files that mutants change."""
    folder = BUILD / module
    shutil.rmtree(folder, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, check=True,
                            capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists(): shutil.copy(ROOT / name, folder / name)
    for name in ("nbs", "symbreak"): shutil.copytree(folder / name, folder / "copied" / name)
    return folder


def draw(items: list, places: int, seed: int) -> set[str]: # job ids
    """One mutant of each of some places, at random but the same each time."""
    by_place = {}
    for item in sorted(items, key=lambda i: (i.mutations[0].start_pos, i.mutations[0].operator_name,
                                             i.mutations[0].occurrence)):
        by_place.setdefault(item.mutations[0].start_pos, []).append(item.job_id)
    chance = random.Random(seed)
    return {chance.choice(by_place[place]) for place in chance.sample(sorted(by_place), min(places, len(by_place)))}


def run(module: str, places: int, seed: int, timeout: int) -> list[str]: # how each has fared
    """Try mutants of a module, and write down what survived."""
    from cosmic_ray.work_db import use_db
    from cosmic_ray.work_item import WorkerOutcome, WorkResult
    folder = copy(module)
    settings, session = folder / "mutants.toml", folder / "mutants.sqlite"
    settings.write_text(SETTINGS.format(module=module, timeout=timeout, python=sys.executable), encoding="utf-8")
    def cosmic_ray(command):
        subprocess.run([sys.executable, "-m", "cosmic_ray.cli", command, settings, session], cwd=folder, check=True)
    cosmic_ray("init")
    with use_db(session) as db:
        chosen = draw(list(db.work_items), places, seed)
        for item in list(db.work_items):
            if item.job_id not in chosen: db.set_result(item.job_id, WorkResult(WorkerOutcome.SKIPPED))
    cosmic_ray("exec")
    with use_db(session) as db:
        found = [(outcome(result), result.diff) for job, result in db.results if job in chosen]
    survivors = "\n\n".join(diff for fared, diff in found if fared == "survived")
    if not survivors:  # or else the guards have shown that they let something pass
        guarded = subprocess.run([sys.executable, "tools/mutants.py", "guard", module], cwd=folder, capture_output=True)
        if guarded.returncode: raise RuntimeError(f"{module}: fails without any mutant\n{guarded.stdout.decode()}")
    (BUILD / f"{module}.diff").write_text(survivors, encoding="utf-8")
    counted = [fared for fared, _ in found if fared != "stillborn"]
    late = counted.count("out of time")
    print(f"{module:12}{counted.count('caught') + late:4} of {len(counted):3} caught" +
          f", {late} of them since they took more than {timeout} s" * bool(late), flush=True)
    return counted


def outcome(result) -> str:
    """How a mutant has fared."""
    if result.test_outcome == "survived": return "survived"
    if result.output == "timeout": return "out of time"  # it hangs, or the machine has other work
    return "stillborn" if STILLBORN in (result.output or "") else "caught"


def sample(modules: list[str], workers: int, **how) -> int:
    """Try mutants of modules, and fail if less than nine in ten were caught."""
    with ThreadPoolExecutor(workers) as pool:
        found = sum(pool.map(partial(run, **how), modules), [])
    caught = len(found) - found.count("survived")
    print(f"{caught} of {len(found)} caught ({caught / len(found):.0%}). Those that survived are in {BUILD}/*.diff; "
          "tests/MUTANTS.md judges the ones that are known")
    return 0 if caught >= 0.9 * len(found) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sample", "guard"))
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=", ".join(GUARDS))
    parser.add_argument("--places", type=int, default=14, help="of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=int, default=240, help="seconds for one mutant; longer counts as caught")
    parser.add_argument("--workers", type=int, default=2, help="modules at once")
    options = parser.parse_intermixed_args()  # modules may come last
    if unknown := set(options.modules) - set(GUARDS):
        parser.error(f"MODULE: {', '.join(unknown)}; allowed: {', '.join(GUARDS)}")
    if options.what == "guard": return [guard(module) for module in options.modules] and 0
    return sample(options.modules or list(GUARDS), options.workers, places=options.places, seed=options.seed,
                  timeout=options.timeout)


if __name__ == "__main__":
    sys.exit(main())
