"""Sources of decoding results: live models or recordings."""
