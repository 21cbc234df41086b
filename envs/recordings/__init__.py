"""Traces and outcomes of decoding, and how they are recorded."""
