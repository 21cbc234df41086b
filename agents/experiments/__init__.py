"""The things that can be learned."""
