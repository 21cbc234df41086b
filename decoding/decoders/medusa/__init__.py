"""Medusa decoding: heads on the target, trees of their candidates, and what of these is accepted."""
