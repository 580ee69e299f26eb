"""Section of the storage of a strategy's soup on the server."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from fedmerge_peft.recipe.section import Section
from fedmerge_peft.recipe.strategy_base import ServerRecipe


class SoupRecipe(Section):
    """Storage of the soup on the server, to save memory."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the soup in memory and in files. bfloat16 takes half of the memory. Each
    step is computed in float32 and rounded up or down at random, so that small steps are not lost
    (Zamirai et al. 2020, arXiv 2010.06192). Clients receive and train float32 adapters."""
    storage: Literal["memory", "disk"] = "memory"
    """Place of the soup. memory: all of it in memory. disk: a temporary file in the run directory,
    for a soup larger than memory. Only a part of the file is in memory at a time, and each merge
    reads the whole file. Such a soup, and one in bfloat16, has no server momentum."""

    @property
    def plain(self) -> bool:
        """True if the soup is in float32 and in memory."""
        return (self.dtype, self.storage) == ("float32", "memory")

    @property
    def floats_in_memory(self) -> float:
        """Memory that each number of the soup takes, in units of 4 bytes."""
        return {"memory": 1.0, "disk": 0.0}[self.storage] * {"float32": 1.0, "bfloat16": 0.5}[
            self.dtype
        ]


class SoupServerRecipe(ServerRecipe):
    """Server optimizer of a soup, and the storage of the soup."""

    soup: SoupRecipe = SoupRecipe()
    """Storage of the soup on the server. bfloat16 and disk require plain SGD on the server and
    merging weights for whole adapters. They cannot be combined with server_optimizer adam,
    server_momentum, blocks, reseed_after, or a private head."""

    @property
    def floats_in_memory(self) -> float:
        return self.soup.floats_in_memory

    @property
    def in_chunks(self) -> bool:
        return not self.soup.plain

    def privacy_refusal(self, mode: str) -> str | None:
        if self.in_chunks and mode == "central":
            return (
                "strategy.soup: noise on the sum of updates needs a float32 soup in memory; remove "
                "soup, or privacy.mode: central"
            )
        return super().privacy_refusal(mode)

    @model_validator(mode="after")
    def _soup_has_chunks(self) -> SoupServerRecipe:
        others = {
            f"server_optimizer: {self.server_optimizer}": self.server_optimizer != "sgd",
            f"server_momentum: {self.server_momentum}": self.momentum > 0,
            "head: private": self.private_head,
            **{
                f"{key}: {value}": value is not None
                for key in ("blocks", "reseed_after")
                for value in (getattr(self, key, None),)
            },
        }
        if not self.soup.plain and (given := [key for key, there in others.items() if there]):
            raise ValueError(
                f"soup: dtype {self.soup.dtype} with storage {self.soup.storage} cannot be "
                f"combined with {given[0]}; remove one of them"
            )
        return self
