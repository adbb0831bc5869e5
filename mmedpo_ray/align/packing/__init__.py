"""Tree packing: what sequences share is computed once. Plain torch."""
