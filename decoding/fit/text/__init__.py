"""Text to learn from: corpora, prompts, continuations by the target, hidden states, batches."""
