"""Hold the package's version, in a file of its own so that every other file may read it."""

__version__ = "0.2.0"
