"""Decoding with a draft tree: growing it, guiding and pruning its growth, and verifying it."""
