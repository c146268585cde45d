"""From documents to batches: the split, the tokens, and a position that is one number."""
