"""Samples → preference pairs, of text and visual."""
