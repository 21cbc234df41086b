"""Judging what was learned, beside baselines."""
