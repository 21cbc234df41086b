"""Judging control of drafts: rules that need no learning, and tables beside them."""
