"""``python -m vte_compile``: the same as ``vte-compile``."""

from vte_compile.cli import main

if __name__ == "__main__":
    main()
