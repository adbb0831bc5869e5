"""Loading and saving a LLaVA, writing its prompts, and what vLLM needs to run it."""
