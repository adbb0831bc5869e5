"""Tokenised pairs: the `prepared` table, its index, and the batches of a training step."""
