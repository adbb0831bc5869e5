"""The tree of settings: loading, overrides, messages. Each section is defined beside its stage."""
