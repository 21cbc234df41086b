"""The report of a run: one self-contained page, its tables as CSV and JSON (`python evaluate.py <run> --report`)."""
