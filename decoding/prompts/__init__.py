"""Prompt sets, shipped, from files or from the hub."""
