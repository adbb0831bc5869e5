"""Trained weights → models to hand on."""
