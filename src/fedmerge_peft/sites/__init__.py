"""Federations across sites: the server, the sites, the messages between them, and their processes.

config        federation.json and site.yaml           messages    the wire format
site_data     a site's examples, and their summary    supervisor  long-lived processes
server/       the remote engine, the roster, the job  site/       the trainer and its audit log
flare/        NVIDIA FLARE as the transport           prepare, rehearse   kits; one-machine runs
"""
