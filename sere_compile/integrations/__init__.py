"""Bridges to other libraries. Each file imports its library itself, when it is used."""
