"""Tuning of the engines that people serve with: search, interval, recommendation, held-out table."""
