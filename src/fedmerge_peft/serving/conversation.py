"""A chat with the adapter of one client."""

from __future__ import annotations

from collections.abc import Callable

from fedmerge_peft.data.columns import no_client
from fedmerge_peft.errors import DataError, RunError
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.serving.predictor import Predictor
from fedmerge_peft.tasks.chat_messages import Message


class Conversation:
    """Chat between a user and a client's adapter, which answers with the recipe's settings.

    Args:
        run: A run with chats and at least one finished round.
        client: The client's name.
        system: System prompt. Default: the recipe's, or the chat template's.
        best: Use the round with the lowest validation loss, even if the run serves its last round.
        device: As in ``Predictor``.

    Raises:
        RunError: The run has no such client or round, or no chats.
        FedMergeError: As ``Predictor``.
    """

    def __init__(
        self,
        run: RunDirectory,
        client: str,
        *,
        system: str | None = None,
        best: bool = False,
        device: str = "auto",
    ) -> None:
        if run.task.get("format") != "messages":
            raise RunError(
                f"{run.path}: its examples are not chats (task {run.recipe.task.name}"
                + (f", format {run.task['format']}" if run.task.get("format") else "")
                + "), so its adapters cannot chat; for single inputs, use run.predict in Python"
            )
        if client not in run.client_names:
            raise RunError(f"the run {no_client(client, run.client_names)}")
        self._client = client
        self._predictor = Predictor(run, best=best, device=device)
        self._begin: list[Message] = [] if system is None else [message("system", system)]
        self.messages = [*self._begin]
        """Messages so far, including the answers."""

    def ask(self, text: str, on_text: Callable[[str], None] = lambda part: None) -> str:
        """Return the client's answer to a message of the user.

        Args:
            text: The message.
            on_text: Called with each further part of the answer while it is generated.

        Raises:
            DataError: The chat template rejects the chat. The message is not kept.
        """
        messages = [*self.messages, message("user", text)]
        try:
            answer = self._predictor.stream(self._client, messages, on_text)
        except DataError as error:
            raise DataError(str(error).removeprefix("input 0: ")) from error
        self.messages = [*messages, message("assistant", answer)]
        return answer

    def restart(self) -> None:
        """Delete all messages except the system prompt."""
        self.messages = [*self._begin]


def message(role: str, content: str) -> Message:
    """Return a chat message from its role and content."""
    return {"role": role, "content": content}
