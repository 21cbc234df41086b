"""Loading targets and drafts by name, path or preset."""
