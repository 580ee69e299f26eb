"""Wire format of messages: named tensors and JSON fields, as a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from fedmerge_peft.errors import WireError
from fedmerge_peft.util.text import printable, shortened

PROTOCOL = 3
"""Version of the wire format; server and sites must use the same."""

_HEADER = 8
"""Number of bytes at the start of a safetensors file that encode the length of its header."""
MAX_HEADER = 2**24
"""Largest size of the JSON header in bytes. The header contains all fields of a message."""
_MAX_KIND = 32


@dataclass(frozen=True)
class Message:
    """One message: its kind, its JSON fields, and its tensors by name."""

    kind: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Serialize the message."""
        header = json.dumps(
            {"protocol": PROTOCOL, "kind": self.kind, "fields": self.fields}, ensure_ascii=False
        )
        tensors: dict[str, Tensor] = {}
        storages: set[int] = set()
        for name, tensor in self.tensors.items():
            value = tensor.detach().to("cpu").contiguous()
            storage = value.untyped_storage().data_ptr()
            # safetensors refuses two tensors that share memory
            tensors[name] = value.clone() if storage in storages else value
            storages.add(storage)
        return save(tensors, metadata={"fedmerge": header})

    @classmethod
    def from_bytes(cls, data: bytes) -> Message:
        """Parse a message. Raises ``WireError`` for invalid bytes and for another protocol."""
        try:
            header = _header(data)
            tensors = load(data)
            protocol, kind, fields = header["protocol"], header["kind"], header["fields"]
        except WireError:
            raise
        except Exception as error:  # safetensors and the JSON parser raise many types
            raise WireError(
                f"a message of {len(data)} bytes cannot be read ({type(error).__name__}); install "
                "the same version on the server and all sites"
            ) from error
        if protocol != PROTOCOL:
            shown = printable(shortened(repr(protocol), 20))
            raise WireError(
                f"the message has protocol {shown}, but this version uses {PROTOCOL}; "
                "install the same version on the server and all sites"
            )
        if not isinstance(kind, str) or len(kind) > _MAX_KIND or not isinstance(fields, dict):
            raise WireError(
                "a message has no valid kind or no fields; install the same version on the server "
                "and all sites"
            )
        return cls(kind, fields, tensors)


def _header(data: bytes) -> Any:
    """Parse the JSON header of a message. Raises ``WireError`` if it is too long."""
    length = int.from_bytes(data[:_HEADER], "little")
    if MAX_HEADER < length <= len(data):
        raise WireError(
            f"the header of a message has {length} bytes, expected at most {MAX_HEADER}"
        )
    return json.loads(json.loads(data[_HEADER : _HEADER + length])["__metadata__"]["fedmerge"])


def kind_of(payload: bytes) -> str:
    """Return the kind of a serialized message without reading its tensors."""
    return str(_header(payload)["kind"])
