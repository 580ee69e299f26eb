"""NVIDIA FLARE's simulator with a PEFT client: what loads and saves the adapter on the server."""

from __future__ import annotations

from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor
from rivals import Turns


class Persistor(PTFileModelPersistor):
    """FLARE's own, which waits for the next turn before the first round and after each."""

    def __init__(self, source_ckpt_file_full_name: str, address: str) -> None:
        super().__init__(source_ckpt_file_full_name=source_ckpt_file_full_name)
        self.address = address

    def load_model(self, fl_ctx):  # type: ignore[no-untyped-def]
        model = super().load_model(fl_ctx)
        self.turns = Turns(self.address)
        self.turns.boundary()
        return model

    def save_model(self, ml, fl_ctx) -> None:  # type: ignore[no-untyped-def]
        super().save_model(ml, fl_ctx)
        self.turns.boundary()
