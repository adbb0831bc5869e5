"""Conversions: LLaVA-Med checkpoints → transformers, preference pairs → other trainers' formats."""
