"""Lookahead decoding: several steps ahead in parallel, verified against the target itself, without any draft model."""
