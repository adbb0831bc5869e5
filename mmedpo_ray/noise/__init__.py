"""Noise in the lesion region of an image, for visual pairs and for the question whether a model looks."""
