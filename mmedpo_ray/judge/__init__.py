"""pairs → scored pairs: agents that judge clinical relevance, their debate, and the weights made of their scores."""
