"""What the sites of a model really did: the numbers behind `Handle.report()`."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from gensparse.processors.site import SPARSE, Site

NOT_SET = "its sparse processor was not set"


class Tally:
    """Counts site calls by outcome and remembers the last outcome of every site."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self._sites = tuple(sites)
        self._calls: Counter[str] = Counter()
        self._last = {site.name: _planned(site) for site in self._sites}
        self._densities: dict[str, float] = {}

    def collect(self) -> None:
        """Take over the outcomes written since the last time; call it before the sites get new actions."""
        for site in self._sites:
            outcome = site.outcome
            if outcome is not None:
                site.outcome = None
                self._calls[outcome] += 1
                self._last[site.name] = outcome
                density = site.density() if outcome == SPARSE else None
                if density is not None:
                    self._densities[site.name] = density

    def densities(self) -> list[float]:
        """Share of the query-key pairs in the last sparse call of every site that had one."""
        self.collect()
        return list(self._densities.values())

    def report(self) -> dict[str, Any]:
        """{"sparse": sites, "dense": {reason: sites}, "calls": the same two counted by call}.

        A site counts by its last call, and by what it is set to do before its first.
        """
        self.collect()
        return {**_split(Counter(self._last.values())), "calls": _split(self._calls)}


def _planned(site: Site) -> str:
    return site.pinned or (SPARSE if site.held else NOT_SET)


def merged(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Sum of the reports of several models."""
    sites: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for report in reports:
        sites.update(_joined(report))
        calls.update(_joined(report["calls"]))
    return {**_split(sites), "calls": _split(calls)}


def _split(outcomes: Counter[str]) -> dict[str, Any]:
    return {
        "sparse": outcomes[SPARSE],
        "dense": {reason: count for reason, count in sorted(outcomes.items()) if reason != SPARSE},
    }


def _joined(counts: dict[str, Any]) -> dict[str, int]:
    return {SPARSE: counts["sparse"], **counts["dense"]}
