"""Visual pairs: an image and the same image with noise in the lesion region."""
