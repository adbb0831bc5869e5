"""pairs → scored pairs: agents that judge clinical relevance, their debate, and weights from the scores."""
