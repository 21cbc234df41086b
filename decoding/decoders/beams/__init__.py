"""Beam search with a shared prefix tree in the target's cache."""
