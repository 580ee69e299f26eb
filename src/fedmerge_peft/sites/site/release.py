"""Rules for everything that a site computes from its examples and sends to the server.

A site is private if the kit's recipe has ``privacy.mode: local``, or if ``site.yaml`` sets noise.
A private site adds noise to all updates, which its budget counts. It sends no losses, scores,
times, choices or causes of failures. With ``privacy.mode: local``, it also sends no groups, no
numbers of examples and no label counts.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fedmerge_peft.errors import ClientError, RefusedError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.runs.directory import with_baselines
from fedmerge_peft.sites.config import SITE_FILE, SitePrivacy
from fedmerge_peft.sites.site.privacy_budget import PrivacyBudget
from fedmerge_peft.sites.site_data import SiteSummary
from fedmerge_peft.strategies.base import Reply
from fedmerge_peft.strategies.differential_privacy import update_privacy as agreed_privacy
from fedmerge_peft.training.plan import InTurn, Plan, Train
from fedmerge_peft.training.update_privacy import UpdatePrivacy, apply_update_privacy
from fedmerge_peft.util.gaussian_privacy import epsilon_of

log = logging.getLogger(__name__)

WITHHELD = "the request failed at a private site; the output of its trainer has the cause"
"""Error text that a private site sends for every failure except a refused or invalid request."""


class ReleaseRules:
    """The rules of one site, from the kit's recipe and ``site.yaml``."""

    def __init__(self, kit: Path, site: SitePrivacy, agreed: Recipe) -> None:
        """Check the settings and create the budget.

        Args:
            kit: The site's kit, which holds the budget.
            site: The section ``privacy`` of ``site.yaml``.
            agreed: The recipe in the kit.

        Raises:
            RefusedError: ``site`` sets noise without a bound on the updates, or ε without noise.
        """
        self.site = site
        self.agreed = agreed
        self.local = agreed.privacy.mode == "local"
        """True if the kit's recipe has ``privacy.mode: local``: the server is not trusted."""
        self.private = self.local or site.noise > 0
        """True if the site is private: it adds noise to updates, and sends no scores or losses."""
        if site.noise > 0 and site.clip is None and agreed.privacy.mode == "none":
            raise RefusedError(
                f"privacy.noise in {SITE_FILE} protects nothing without a bound on the updates; "
                "set privacy.clip too"
            )
        if site.epsilon is not None and not self.private:
            raise RefusedError(
                f"privacy.epsilon in {SITE_FILE} needs updates with noise; set privacy.clip and "
                "privacy.noise too"
            )
        epsilon = site.epsilon
        if epsilon is None and self.local:
            epsilon = agreed_epsilon(agreed)
        self.budget = PrivacyBudget(kit, agreed.privacy.delta, epsilon)

    # ---- start of a job --------------------------------------------------------------------------

    def summary(self, summary: SiteSummary) -> SiteSummary:
        """Return the summary to send.

        With ``privacy.mode: local``, placeholders replace groups and numbers of examples.
        """
        if not self.local:
            return summary
        hidden = {"group": "", "train": 1, "validation": 0, "test": 0}
        return replace(summary, clients=tuple({**client, **hidden} for client in summary.clients))

    def label_counts(
        self, counts: Sequence[Sequence[int]] | None
    ) -> Sequence[Sequence[int]] | None:
        """Return the label counts to send; return None with ``privacy.mode: local``."""
        return None if self.local else counts

    # ---- rounds ----------------------------------------------------------------------------------

    def update_privacy(self, plan: Plan) -> UpdatePrivacy | None:
        """Return the smallest clip and largest noise of plan, kit's recipe and ``site.yaml``.

        Return None if none of them clips or adds noise.

        Raises:
            RefusedError: The plan lacks the privacy that the kit's recipe requires, or the site is
                private and the plan requests more than updates.
        """
        requested = plan.privacy if isinstance(plan, Train) else None
        if requested is None and self.agreed.privacy.mode != "none":
            raise RefusedError(
                f"privacy.mode is {self.agreed.privacy.mode} in the kit's recipe, "
                "but the server's request does not clip the update; use the strategy of the kit's "
                "recipe on the server"
            )
        if self.private and not isinstance(plan, Train | InTurn):
            raise RefusedError(
                "this site adds noise to updates, and therefore sends no choices or weights that "
                "depend on its losses; use another strategy on the server, such as fedavg"
            )
        return strictest_privacy(self.site, requested, agreed_privacy(self.agreed.privacy))

    def charge(self, client: str, plan: Plan, privacy: UpdatePrivacy | None) -> None:
        """Charge the budget of a private site for a plan's update, before the client trains.

        Raises the errors of ``PrivacyBudget.charge``.
        """
        if self.private and privacy is not None:
            self.budget.charge(client, privacy.mu_squared, plan.returned_rows)

    def reply(
        self,
        outcome: Reply | ClientError,
        index: int,
        size: int,
        plan: Plan,
        privacy: UpdatePrivacy | None,
    ) -> Reply:
        """Return the reply to send.

        If a client of a private site fails, the update is noise alone, so that the update does not
        reveal the failure; the trainer's output has the cause.

        Args:
            outcome: The client's reply without noise, or its failure.
            index: Index of the client at this site.
            size: Number of the client's training examples.
            plan: The plan.
            privacy: Clip and noise of ``update_privacy``.

        Raises:
            ClientError: The client failed, and the site is not private.
        """
        if isinstance(outcome, ClientError):
            if not self.private:
                raise outcome
            log.error("%s; the site sends noise in place of the client's update", outcome)
            empty = torch.zeros(plan.returned_rows, plan.sent.shape[1])
            outcome = Reply(index, empty, size, 0.0, 0.0, round=outcome.round)
        if privacy is not None:
            outcome = replace(outcome, deltas=filter_update(outcome.deltas, plan, privacy))
        if not self.private:
            return outcome
        return replace(
            outcome,
            size=1 if self.local else outcome.size,
            train_loss=None,
            seconds=0.0,
            served=None,
            finetuned=None,
            validation=None,
        )


def agreed_epsilon(recipe: Recipe) -> float:
    """Return the ε of a client that sends one update in every round of a recipe and its baselines.

    The recipe must have ``privacy.mode: local``. Strategies that are not ``federated`` do not
    count.
    """
    methods = [one for one, _ in with_baselines(recipe, Path()) if one.strategy.federated]
    mu = 1 / recipe.privacy.noise
    return epsilon_of(recipe.rounds * len(methods) * mu * mu, recipe.privacy.delta)


def strictest_privacy(site: SitePrivacy, *others: UpdatePrivacy | None) -> UpdatePrivacy | None:
    """Return the strictest of several settings: the smallest clip and the largest noise.

    Return None if none of them clips or adds noise.
    """
    given = [privacy for privacy in others if privacy is not None]
    clips = [clip for clip in (site.clip, *(privacy.clip for privacy in given)) if clip is not None]
    noise = max([site.noise, *(privacy.noise for privacy in given)])
    return UpdatePrivacy(min(clips, default=float("inf")), noise) if clips or noise else None


def filter_update(deltas: Tensor, plan: Plan, privacy: UpdatePrivacy) -> Tensor:
    """Clip each row of an update, add noise to its trained columns, and set the others to zero.

    Args:
        deltas: The update, ``(k, P)``.
        plan: The plan; its phases determine the trained columns.
        privacy: Clip and noise; the noise comes from the operating system's generator.

    Returns:
        The filtered update, ``(k, P)``.
    """
    if isinstance(plan, InTurn):
        phases = [job.phases for job in plan.jobs]
    else:
        phases = [plan.phases if isinstance(plan, Train) else (None,)] * len(deltas)
    return torch.stack(
        [
            apply_update_privacy(row, privacy, columns, None)
            for row, columns in zip(deltas, phases, strict=True)
        ]
    )
