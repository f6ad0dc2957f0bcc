"""Findings: everything that is wrong with a package, an adapter folder or a registry."""
