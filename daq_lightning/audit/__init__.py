"""Reads a finished export: rules, checks, figures computed again, chains."""
