"""The command line: ``instantcharacter`` where the package is installed, ``python -m instantcharacter`` anywhere."""
