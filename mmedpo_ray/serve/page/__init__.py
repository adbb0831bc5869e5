"""The page of the endpoint: two models side by side, blind votes, and whether a model looks at the image."""
