"""The shell: python -m instantcharacter."""
