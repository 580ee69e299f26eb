"""NVIDIA FLARE as the way between server and sites: the only modules that import nvflare."""
