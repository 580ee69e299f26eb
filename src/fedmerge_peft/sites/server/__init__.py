"""Server of a federation across sites: remote engine, roster and job."""
