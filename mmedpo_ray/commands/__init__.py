"""The commands of ``mmedpo``: their options, their help, and what each starts."""
