"""Fit drafts, n-gram tables, Medusa heads and draft-tree networks to a target: ``python -m specgym.decoding.fit``."""
