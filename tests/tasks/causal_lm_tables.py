"""Two small tables of texts."""

from __future__ import annotations

from datasets import Dataset

NAME = "causal-lm"
PAIRS = Dataset.from_dict(
    {"prompt": ["Two and three?", "Name a colour:"], "completion": [" five", " red"]}
)
CHATS = Dataset.from_dict(
    {
        "messages": [
            [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}],
            [
                {"role": "system", "content": "Be kind"},
                {"role": "user", "content": "Who?"},
                {"role": "assistant", "content": "Me"},
            ],
        ]
    }
)
