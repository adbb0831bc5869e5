"""Which rank computes which pairs in which step, and what a step costs."""
