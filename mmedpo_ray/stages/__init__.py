"""The stages of the pipeline and what is checked before one starts."""
