"""Tables and metrics → report.html."""
