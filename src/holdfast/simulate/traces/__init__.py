"""Availability and prices of spot capacity over time: read from files, fitted, made up from a seed."""
