"""Federations across sites: the server, the sites, the messages between them, and their processes.

config        federation.json and site.yaml           supervisor  long-lived processes
site_data     a site's examples, and their summary    messages, fields, wire   the wire format
server/       the remote engine, the roster, the job  site/       the trainer and its audit log
flare/        NVIDIA FLARE as the transport           prepare, wheel   the kits, and their wheel
rehearse      a federation on one machine
"""
