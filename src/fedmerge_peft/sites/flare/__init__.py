"""NVIDIA FLARE as the transport between server and sites; only these modules import nvflare."""
