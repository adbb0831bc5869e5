"""Raw data sets → `samples`."""
