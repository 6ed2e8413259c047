"""Study files: read, check, override, compare."""
