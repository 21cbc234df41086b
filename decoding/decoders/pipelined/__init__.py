"""Pipelined decoding: the draft goes on while the target verifies."""
