"""qconvert: trained checkpoints into small, fast, portable artifacts that are proven to work."""
