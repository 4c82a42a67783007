"""Comparing samplers on one model: measurements, a report that a person opens, a recommendation."""
