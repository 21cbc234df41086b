"""Measure a saved run again on held-out prompts: ``python evaluate.py runs/<name>``."""

from specgym.agents.command_line import evaluate_command

if __name__ == "__main__":
    raise SystemExit(evaluate_command())
