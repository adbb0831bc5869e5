"""Text pairs: a reference answer and a plausible wrong one."""
