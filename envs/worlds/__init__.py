"""Worlds: tuning problems of exact decoding, simulated from recorded pairs and hardware of all kinds."""
