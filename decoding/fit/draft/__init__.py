"""Fit drafts: distilled models and n-gram tables."""
