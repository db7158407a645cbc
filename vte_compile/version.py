"""The version of vte-compile, in the one place it is written; setup.py reads it from here."""

__version__ = "0.1.0.dev0"
