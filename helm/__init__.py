"""The chart's tools; Helm itself passes them over."""
