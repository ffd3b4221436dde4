"""Measures curvature and shows it: the operator, stability limits, spectra, the report, the board."""
