"""L1: object stores behind one small interface."""
