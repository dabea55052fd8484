"""The version, in one place: the package, its metadata and model cards read it here."""

__version__ = "0.1.0"
