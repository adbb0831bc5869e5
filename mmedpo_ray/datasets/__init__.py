"""Rows of raw data sets and of preference tables: reading, cleaning, and why a row cannot be used."""
