"""The OpenAI-compatible endpoint: Ray Serve in front of vLLM."""
