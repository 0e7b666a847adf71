"""Proof of an output's origin: signatures, provenance, the bill of materials."""
