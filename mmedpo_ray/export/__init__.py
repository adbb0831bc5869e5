"""Trained weights → models for others to use."""
