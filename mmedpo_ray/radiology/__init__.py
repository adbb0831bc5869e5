"""What radiological text says, and edits that change one fact of it."""
