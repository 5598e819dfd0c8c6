"""Files on disk: what qconvert writes so that it survives a crash, and reads back as it was written."""
