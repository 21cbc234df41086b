"""Measure a saved run again, report on it, or recommend with it: ``python evaluate.py --help``."""

from specgym.agents import evaluate_command

if __name__ == "__main__":
    raise SystemExit(evaluate_command())
