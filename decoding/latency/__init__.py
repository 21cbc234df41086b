"""Latency profiles: measured, computed, stored."""
