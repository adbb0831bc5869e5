"""Files by URI, and images: what a model sees is decoded here and nowhere else."""
