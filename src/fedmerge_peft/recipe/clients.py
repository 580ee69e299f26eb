"""Section of the clients: participation, failures and time limits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedmerge_peft.recipe.section import Count, Section


class ClientsRecipe(Section):
    """Participation of clients in a round, and the treatment of failures."""

    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Fraction of the clients that is drawn at random for each round. With `sampling: fixed`, at
    least one client is drawn."""
    sampling: Literal["fixed", "poisson"] = "fixed"
    """fixed: each round has the same number of clients. poisson: each client is drawn independently
    with the probability `fraction`. A round may then have no clients; in such a round, the server
    takes its step with an update of zeros, to which central privacy adds its noise. With
    `privacy.mode: central` and `fraction` below 1, poisson reduces epsilon (privacy.md). Across
    sites, the server draws poisson samples with the operating system's random number generator."""
    failures: Literal["raise", "skip"] = "raise"
    """raise: a failed client ends the run, which can be resumed. skip: the log and the round's
    record name the client, and the round continues as if the client had not been selected. A client
    fails if its training or scoring raises an error, if it does not reply, replies more than once
    or for another round, or exceeds `timeout`. It also fails if its reply has numbers that are not
    finite or out of range, or another shape, dtype or layout than requested."""
    min_clients: Count = 1
    """Minimum number of clients with valid replies in a round; it matters with `failures: skip`. A
    round with fewer valid replies changes nothing and ends the run, which can be resumed. Of a
    smaller poisson sample, all clients must reply."""
    timeout: Annotated[float, Field(gt=0, le=31_536_000)] | None = None
    """Maximum time in seconds that a client may take for a round, including evaluation; null for no
    limit. Clients that train in this process are not interrupted: their time is checked afterwards.
    If several clients train in one forward pass, its time is divided equally among them. A run is
    not reproducible if clients take about as long as this limit."""
