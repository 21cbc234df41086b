"""Environments whose actions end a draft."""
