"""Scored pairs → trained weights: weighted preference optimisation under Ray Train and DeepSpeed."""
