"""Exit with an error if a notebook is not clean, or if `symbreak/` is not what the notebooks export."""
import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def differing(ours: Path, theirs: Path, pattern: str) -> list[str]:
    """Relative paths that are missing on one side or differ in content."""
    names = {p.relative_to(base).as_posix() for base in (ours, theirs) for p in base.rglob(pattern) if ".ipynb_checkpoints" not in p.parts}
    return sorted(n for n in names if not ((ours / n).exists() and (theirs / n).exists() and filecmp.cmp(ours / n, theirs / n, shallow=False)))


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        for name in ("nbs", "symbreak"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
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
    print(f"{'not ' if unclean or stale else ''}clean and exported: notebooks and library")
    return 1 if unclean or stale else 0


if __name__ == "__main__":
    sys.exit(main())
