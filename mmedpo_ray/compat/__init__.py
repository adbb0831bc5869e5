"""Joining a Ray cluster, and every change to the internals of a dependency, one file each."""
