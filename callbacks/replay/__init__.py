"""Prioritised replay for PPO."""
