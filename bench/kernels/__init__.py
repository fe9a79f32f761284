"""Time of single ops and modules."""
