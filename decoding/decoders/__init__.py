"""The decoding algorithms."""
