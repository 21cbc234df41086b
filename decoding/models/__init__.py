"""Language models as decoders use them: forward passes, caches, token trees."""
