"""Fit EAGLE heads."""
