"""Federations across sites: what travels, what a site does and allows, what the server knows, and the commands' work.

wire        plans and replies as messages             settings, data, departures   what a site decides, holds, and has sent
trainer     a site: answers messages                  link, processes, orphan      a site's processes, and between them
remote      the engine whose clients are elsewhere    roster, server               what the server knows; one job at the server
flare/      NVIDIA FLARE as the way between them      prepare, rehearse            kits; all of it on one machine
"""
