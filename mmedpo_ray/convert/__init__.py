"""Conversions: an original LLaVA-Med checkpoint → transformers, preference pairs → other trainers' formats."""
