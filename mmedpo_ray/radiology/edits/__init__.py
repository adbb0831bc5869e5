"""Rule edits: a reference answer with one fact changed."""
