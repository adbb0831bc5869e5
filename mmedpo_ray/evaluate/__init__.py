"""Endpoint and test samples → answers and scores."""
