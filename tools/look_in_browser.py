"""Open every page below some folders in headless Chromium: no console message, no failed load; a screenshot of each.

    python tools/look_in_browser.py build/site build/report [--shots build/shots] [--width 1280] [--dark]

Needs Chromium (on Debian: apt install chromium). Not part of `make test`, since not every machine has a browser;
check_links does what needs none.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
COMPLAINT = re.compile(r":CONSOLE.*?\] (.*)|(net::ERR_\w+.*)")


def browser() -> str:
    """The first Chromium on the path."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None: sys.exit(f"no browser found; looked for {', '.join(NAMES)}")
    return found


def complaints(page: Path, shot: Path, width: int, dark: bool) -> list[str]:
    """What the browser has to say about a page, which it also draws."""
    shot.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        command = [browser(), "--headless=new", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
                   f"--user-data-dir={profile}", f"--window-size={width},2400", "--virtual-time-budget=4000",
                   f"--screenshot={shot}", page.absolute().as_uri()]
        if hasattr(os, "geteuid") and os.geteuid() == 0: command.insert(1, "--no-sandbox")  # demanded of root
        if dark: command.insert(1, "--blink-settings=preferredColorScheme=0")
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = [next(filter(None, match.groups())) for match in COMPLAINT.finditer(done.stderr)]
    return found if shot.exists() else [*found, f"no screenshot, exit code {done.returncode}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--shots", type=Path, default=Path("build/shots"))
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    pages = [(folder, page) for folder in options.folders for page in sorted(folder.rglob("*.html"))]
    if not pages: sys.exit(f"no pages below {', '.join(map(str, options.folders))}")
    def look(item):
        folder, page = item
        shot = options.shots / folder.name / page.relative_to(folder).with_suffix(".png")
        return page, complaints(page, shot, options.width, options.dark)
    with ThreadPoolExecutor(2) as pool: said = dict(pool.map(look, pages))
    for page, lines in said.items():
        for line in lines: print(f"{page}: {line}")
    print(f"{len(pages)} pages, {sum(map(len, said.values()))} complaints, screenshots in {options.shots}")
    sys.exit(any(said.values()))


if __name__ == "__main__":
    main()
