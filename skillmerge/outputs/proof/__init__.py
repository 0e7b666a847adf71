"""Who made an output and what of: signatures, provenance, the bill of materials."""
