"""Raw data sets → `samples`: one file a format, and the phantom world."""
