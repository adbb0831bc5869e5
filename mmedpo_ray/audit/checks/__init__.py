"""The checks of the audit: each reads `Features` and returns findings."""
