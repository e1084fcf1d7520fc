"""Exit with an error if a notebook is not clean, or if symbreak/ or nbs/README.md is not what the notebooks make."""
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from reading_order import reading_order

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def differing(ours: Path, theirs: Path, pattern: str) -> list[str]:
    """Relative paths that are missing on one side or differ in content."""
    names = {path.relative_to(base).as_posix() for base in (ours, theirs) for path in base.rglob(pattern)
             if ".ipynb_checkpoints" not in path.parts}
    return sorted(name for name in names if filecmp.cmpfiles(ours, theirs, [name], shallow=False)[0] == [])


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        for name in ("nbs", "symbreak"):
            unwanted = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
        for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md"):
            shutil.copyfile(ROOT / name, copy / name)
        for command in ("nbdev_clean", "nbdev_export"):
            subprocess.run([BIN / command], cwd=copy, check=True)
        unclean = differing(ROOT / "nbs", copy / "nbs", "*.ipynb")
        stale = differing(ROOT / "symbreak", copy / "symbreak", "*.py")
    for name in unclean:
        print(f"nbs/{name} is not clean: run nbdev_clean")
    for name in stale:
        print(f"symbreak/{name} is not what the notebooks export: run nbdev_export")
    listed = (ROOT / "nbs/README.md").read_text(encoding="utf-8") == reading_order()
    if not listed: print("nbs/README.md is not up to date: run python tools/reading_order.py")
    wrong = bool(unclean or stale or not listed)
    print(f"{'not ' if wrong else ''}clean, exported and listed: notebooks and library")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
