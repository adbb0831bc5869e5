"""Parquet tables between stages: schemas, the stage runner, parts, commits, manifests, lineage."""
