"""Judging tuners in simulated worlds that are kept apart, beside what needs no learning."""
