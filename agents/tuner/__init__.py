"""Tuning a workload that was never seen, from a handful of measurements; and what a sceptic would use instead."""
