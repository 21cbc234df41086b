"""Fit the networks that guide draft trees: alignments and acceptance predictors."""
