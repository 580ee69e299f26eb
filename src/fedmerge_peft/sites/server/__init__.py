"""Server of a federation across sites: start of a job, engine, and record of the clients."""
