"""Visual tools: where in an image is the lesion, and how sure is the tool."""
