"""``mmedpo audit``: what in a table of preference pairs would teach the wrong thing.

    audit(config)              the step of `mmedpo run`: the run's scored/ against its samples/
    audit_command(config, …)   the command: any table of pairs, with --fix a cleaned copy

The table is read once into numbers (`features`), slice by slice in Ray Data tasks (`extract`); every check is
a function of these numbers (`shortcuts`, `answers`, `rows`, `weights`, `visual`) that returns one `Finding`.
"""
