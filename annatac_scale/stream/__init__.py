"""Which cells, when, on which rank, and as which tokens: from a store to batches."""
