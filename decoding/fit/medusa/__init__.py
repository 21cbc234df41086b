"""Fit Medusa heads, alone or jointly with their target."""
