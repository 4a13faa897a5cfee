"""Certificates of the members of a cluster, and signed commands."""
