"""tables and metrics → report.html."""
