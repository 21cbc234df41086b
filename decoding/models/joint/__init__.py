"""Passes of one model over several texts at once."""
