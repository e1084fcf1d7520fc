"""`python -m symbreak` is the command `symbreak`."""
import sys

from symbreak.cli import main

if __name__ == "__main__": sys.exit(main())
