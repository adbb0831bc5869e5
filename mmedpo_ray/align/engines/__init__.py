"""Optimizer steps: plain data parallelism, and DeepSpeed ZeRO."""
