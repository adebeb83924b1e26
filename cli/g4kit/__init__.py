"""The command line: stages weights and data, launches runs, follows them, fetches results."""

__version__ = "0.1.0"
